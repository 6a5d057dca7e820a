"""Draws docs/gpu.png from the rows of one run, and prints the tables of docs/triton.md.

python benchmarks/gpu/picture.py FOLDER docs/gpu.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd


def draw(folder: Path, target: Path) -> None:
    """Draws the speed-up of one FFN by tokens and sparsity beside its bound, and tokens per second of decoders."""
    ffn, decoder = pd.read_csv(folder / "ffn.csv"), pd.read_csv(folder / "decoder.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for tokens, rows in ffn[ffn.tokens.isin([1, 4, 16, 512, 4096])].groupby("tokens"):
        (line,) = left.plot(100 * rows.sparsity, rows.ratio, marker="o", label=f"{tokens:,}")
        if tokens == 1:
            left.plot(100 * rows.sparsity, rows.bound, linestyle=":", color=line.get_color(), label="1, bound")
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(title="One LLaMA-2-7B FFN", xlabel="sparsity, %", ylabel="dense time / sparse time", ylim=(0, None))
    left.legend(title="tokens", frameon=False)

    for way, rows in decoder[decoder.way != "eager"].groupby("way", sort=False):
        rows = pd.concat([pd.DataFrame({"sparsity": [0.0], "tokens_s": [1e3 / rows.dense_ms.median()]}), rows])
        right.plot(100 * rows.sparsity, rows.tokens_s, marker="o", label=way)
    right.set(
        title="A decoder of LLaMA-2-7B's shape", xlabel="sparsity, % (0: the dense model)", ylabel="tokens per second"
    )
    right.set_ylim(0, None)
    right.legend(frameon=False)
    about = ffn.iloc[0]
    figure.suptitle(f"{about.gpu}, torch {about.torch}, triton {about.triton}, {about.date}", fontsize=9)
    figure.savefig(target, dpi=130)


def tables(folder: Path) -> str:
    """Returns the tables of the FFN and of the decoder, in Markdown."""
    ffn, decoder = pd.read_csv(folder / "ffn.csv"), pd.read_csv(folder / "decoder.csv")
    lines = ["| tokens | dense, µs | 0 % | 50 % | 80 % | 90 % | bound |", "|" + "---|" * 7]
    for tokens, rows in ffn.groupby("tokens"):
        cells = [f"{row.us:,.1f} µs, **{row.ratio:.2f}x**" for row in rows.itertuples()]
        bounds = " / ".join(f"{bound:.2f}" for bound in rows.bound)
        lines.append(f"| {tokens:,} | {rows.dense_us.median():,.1f} | {' | '.join(cells)} | {bounds} |")
    lines += ["", "| step | dense | 50 % | 80 % | 90 % |", "|" + "---|" * 5]
    for way, rows in decoder.groupby("way", sort=False):
        cells = [f"{row.ms:.2f} ms, {row.tokens_s:.0f} tokens/s, **{row.ratio:.2f}x**" for row in rows.itertuples()]
        dense_ms = rows.dense_ms.median()
        lines.append(f"| {way} | {dense_ms:.2f} ms, {1e3 / dense_ms:.0f} tokens/s | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
    print(tables(Path(sys.argv[1])))

"""Draws the sparsity dial: one fit per eta, with the separability loss ramped in (ours) or constant (the paper's text).

python benchmarks/dial.py --out docs     # 20 minutes on two busy cores; a second start runs only the missing points

You can run each point yourself: `lightning fit --config conf/quickstart.yaml --config conf/parts/paper.yaml
--model.efficiency_weight ETA ...`. All points start from one dense model. The script writes dial.json and dial.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

CONF = Path(__file__).parent.parent / "conf"
VARIANTS = {
    "lambda ramped in (default)": (),
    "lambda constant": ("--model.separability_start", "0", "--model.separability_end", "0"),
}


def fit(root: Path, name: str, *arguments: str) -> dict:
    """Returns the results of one fit, and runs it first if there are none."""
    done = sorted(root.glob(f"{name}/*/results.json"))
    if not done:
        command = [sys.executable, "-m", "lte_lightning", "fit", "--config", str(CONF / "quickstart.yaml")]
        command += ["--config", str(CONF / "parts" / "paper.yaml"), *arguments]
        command += ["--run.root", str(root), "--run.experiment", name, "--trainer.logger", "false"]
        subprocess.run(command, check=True)
        done = sorted(root.glob(f"{name}/*/results.json"))
    return json.loads(done[-1].read_text()) | {"folder": str(done[-1].parent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of dial.json and dial.png")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/dial"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--etas", type=float, nargs="+", default=[0.1, 0.3, 1.0, 2.0], help="default: %(default)s")
    parser.add_argument("rest", nargs="*", help="further arguments of every fit, behind --")
    args = parser.parse_args()

    dense = fit(args.root, "dense", "--stages.router.epochs", "0", "--stages.expert.epochs", "0", *args.rest)
    start = ("--model.init_from", f"{dense['folder']}/model", "--stages.dense.epochs", "0")
    curves: dict[str, list[dict]] = {}
    for i, (label, variant) in enumerate(VARIANTS.items()):
        for eta in args.etas:
            point = fit(args.root, f"{i}-{eta}", *start, "--model.efficiency_weight", str(eta), *variant, *args.rest)
            keys = ("hard", "hard_before", "sparsity", "sparsity_per_layer")
            curves.setdefault(label, []).append({"eta": eta} | {key: point[key] for key in keys})
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"dense": dense["dense"], "versions": dense["versions"], "arguments": args.rest, "curves": curves}
    (args.out / "dial.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.out / "dial.png")
    print(args.out / "dial.png")


def draw(record: dict, path: Path) -> None:
    """Draws sparsity and accuracy against eta."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle("Sparsity dial: MiniLM on movie reviews, one router and one expert epoch", fontsize=10)
    left, right = figure.subplots(1, 2)
    for (label, points), color in zip(record["curves"].items(), ("#31688e", "#c44e52"), strict=True):
        etas = [point["eta"] for point in points]
        left.plot(etas, [100 * point["sparsity"] for point in points], "o-", color=color, label=label)
        right.plot(etas, [point["hard"] for point in points], "o-", color=color, label=label)
    right.axhline(record["dense"], color="gray", linestyle="--", label="dense")
    left.set(xlabel="eta (efficiency weight)", ylabel="FFN sparsity (%)", ylim=(-3, 103), xscale="log")
    right.set(xlabel="eta (efficiency weight)", ylabel="validation accuracy, hard", xscale="log")
    for axes in (left, right):
        axes.set_xticks(etas, [f"{eta:g}" for eta in etas])
        axes.minorticks_off()
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

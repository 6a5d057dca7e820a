"""Which tiles are fastest: every row of written lists for one token, sixteen and 4,096, on LLaMA-2-7B's FFN.

``python benchmarks/gpu/tiles.py I N`` compiles every N-th row from the I-th on into Triton's cache, and times nothing.
"""

import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from ffn import make_layers
from timing import capture, elapsed_ms

from lte_lightning.kernels.triton import decode, prefill, stream


def combine(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# Table, key (bytes per weight, or those and the padded number of tokens), tokens, rows to try.
LISTS: list[tuple[str, dict[Any, Any], Any, int, list[dict[str, int]]]] = [
    ("stream", stream.STREAM, 2, 1, combine(TILE=(4096, 8192, 16384), num_warps=(4, 8, 16), PER_SM=(1, 2, 3, 4))),
    ("router", stream.ROUTER, 2, 1, combine(TILE=(4096, 8192, 16384), num_warps=(4, 8))),
    ("hidden", decode.HIDDEN, (2, 16), 16, combine(ROWS=(16, 32), BLOCK_D=(64, 128, 256), num_warps=(2, 4), STAGES=(3, 4, 5))),
    ("down", decode.DOWN, (2, 16), 16, combine(BLOCK_S=(32,), BLOCK_D=(64, 128, 256), num_warps=(2, 4, 8), STAGES=(2, 3, 4))),
    ("grouped", prefill.GROUPED, 2, 4096, combine(BLOCK_F=(32,), BLOCK_D=(64, 128), num_warps=(4, 8), num_stages=(3, 4, 5))),
    ("union", prefill.UNION, 2, 4096, combine(BLOCK_F=(64, 128), BLOCK_D=(64,), num_warps=(4, 8), num_stages=(3, 4))),
    ("prefill down", prefill.DOWN, 2, 4096, combine(BLOCK_F=(32, 64), BLOCK_D=(128, 256), num_warps=(4, 8), num_stages=(3, 4))),
]  # fmt: skip


def start_compiling(workers: int) -> list[subprocess.Popen[bytes]]:
    """Starts processes that fill Triton's cache with all rows."""
    return [subprocess.Popen([sys.executable, __file__, str(i), str(workers)]) for i in range(workers)]


def compile_every(first: int, step: int) -> None:
    """Compiles every ``step``-th row."""
    jobs = [(table, key, tokens, row) for _, table, key, tokens, rows in LISTS for row in rows]
    made: dict[int, Any] = {}
    for table, key, tokens, row in jobs[first::step]:
        layer = made.setdefault(tokens, make_layers("llama2-7b", torch.bfloat16, tokens, 1, above_cache=False)[0])
        chosen, table[key] = table[key], row
        try:
            layer.both(torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda"))
        except Exception as error:  # a tile that does not fit the chip: `tune` reports it
            print(row, str(error).splitlines()[0][:100], file=sys.stderr)
        table[key] = chosen


def tune() -> list[dict[str, Any]]:
    """Rows of every list, the fastest first, with the sum over sparsities of microseconds per layer."""
    results = []
    for name, table, key, tokens, rows in LISTS:
        layers = make_layers("llama2-7b", torch.bfloat16, tokens, 8 if tokens <= 64 else 1, above_cache=tokens <= 64)
        x_ND = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        sparsities = {"union": (0.5,), "grouped": (0.8, 0.9), "prefill down": (0.8,)}.get(name, (0.5, 0.8, 0.9))
        chosen, measured = table[key], []
        for row in rows:
            table[key] = row
            try:
                graph = capture(lambda layers=layers, x_ND=x_ND: [layer.both(x_ND) for layer in layers])
            except Exception as error:  # a tile that does not fit the chip
                results.append({"table": name, "row": str(row), "error": str(error).splitlines()[0][:100]})
                continue
            times = {}
            for sparsity in sparsities:
                rounds = []
                for _ in range(5):
                    for layer in layers:
                        layer.draw(sparsity)
                    rounds.append(1e3 * elapsed_ms(graph.replay) / len(layers))
                times[f"{sparsity:.0%}"] = statistics.median(rounds)
            measured.append({"table": name, "row": str(row), "sum_us": sum(times.values()), **times})
        measured.sort(key=lambda row: row["sum_us"])
        # What is measured after this in the same run is measured with the fastest.
        table[key] = next((row for row in rows if measured and str(row) == measured[0]["row"]), chosen)
        results += measured
    return results


if __name__ == "__main__":
    compile_every(int(sys.argv[1]), int(sys.argv[2]))

"""Finds the fastest tiles: times each row of written lists for 1, 16 and 4,096 tokens on LLaMA-2-7B's FFN.

``python benchmarks/gpu/tiles.py I N`` only compiles every N-th row from the I-th on into Triton's cache.
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

from lte_lightning.kernels.triton import decode, prefill, router, stream


def combine(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# What is tuned, the module and name of its table, its key (bytes per weight; None: the table is the row), tokens, and
# the rows to try. Of prefill's two forms only the tuned one runs.
LISTS: list[tuple[str, Any, str, int | None, int, list[Any]]] = [
    ("one", stream, "STREAM", 2, 1, combine(TILE=(8192,), num_warps=(4, 8), PER_SM=(2, 3))),
    ("one: sum", stream, "SUM", None, 1, combine(BLOCK_D=(16, 32), num_warps=(4, 8))),
    ("router", router, "ROUTER", 2, 1, combine(TILE=(4096, 8192), num_warps=(2, 4, 8))),
    ("few: router", router, "ROUTER_FEW", 2, 16, combine(TILE=(4096, 8192), num_warps=(4, 8, 16))),
    ("few: hidden", decode, "HIDDEN", 2, 4, combine(ROWS=(16, 32), BLOCK_D=(128,), num_warps=(2, 4), STAGES=(3, 4))),
    ("few: down", decode, "DOWN", 2, 4, combine(BLOCK_S=(32,), BLOCK_D=(128, 256), num_warps=(2, 4), STAGES=(3, 4))),
    ("one block", prefill, "FEW", None, 64, combine(BLOCK_M=(64,), BLOCK_F=(32, 64), BLOCK_D=(64,), num_warps=(4,), num_stages=(4, 5, 6))),  # noqa: E501
    ("union", prefill, "WIDE_UNION", None, 4096, combine(BLOCK_M=(128,), BLOCK_F=(64, 128), BLOCK_D=(64,), num_warps=(8,), num_stages=(3, 4))),  # noqa: E501
    ("union: swizzle", prefill, "SWIZZLE", None, 4096, [1, 4, 8, 16, 32]),
    ("grouped, 512", prefill, "GROUPED", None, 512, combine(BLOCK_M=(64, 128), BLOCK_F=(32,), BLOCK_D=(64,), num_warps=(4, 8), num_stages=(3, 4))),  # noqa: E501
    ("grouped", prefill, "GROUPED", None, 4096, combine(BLOCK_M=(64, 128), BLOCK_F=(32,), BLOCK_D=(64,), num_warps=(4, 8), num_stages=(3, 4))),  # noqa: E501
]  # fmt: skip
FORCED = {"union": 10**6, "union: swizzle": 10**6, "grouped, 512": 0, "grouped": 0}


def install(module: Any, table: str, key: int | None, row: Any) -> Any:
    """Puts a row into its table, and returns the previous row."""
    place = vars(module) if key is None else getattr(module, table)
    name = table if key is None else key
    before, place[name] = place[name], row
    return before


def start_compiling(workers: int) -> list[subprocess.Popen[bytes]]:
    """Starts processes that fill Triton's cache with all rows."""
    return [subprocess.Popen([sys.executable, __file__, str(i), str(workers)]) for i in range(workers)]


def compile_every(first: int, step: int) -> None:
    """Compiles every ``step``-th row."""
    jobs = [(*rest, row) for _, *rest, rows in LISTS for row in rows]
    made: dict[int, Any] = {}
    for module, table, key, tokens, row in jobs[first::step]:
        if tokens not in made:
            made[tokens] = make_layers("llama2-7b", torch.bfloat16, tokens, 1, above_cache=False)[0]
        before = install(module, table, key, row)
        try:
            made[tokens].both(torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda"))
        except Exception as error:  # a tile that does not fit the chip: `tune` reports it
            print(row, str(error).splitlines()[0][:100], file=sys.stderr)
        install(module, table, key, before)


def tune() -> list[dict[str, Any]]:
    """Returns the rows of every list, fastest first, with microseconds per layer summed over sparsities."""
    results = []
    cost = prefill.GROUPED_COST_16THS
    for name, module, table, key, tokens, rows in LISTS:
        prefill.GROUPED_COST_16THS = FORCED.get(name, cost)
        layers = make_layers("llama2-7b", torch.bfloat16, tokens, 8 if tokens <= 64 else 1, above_cache=tokens <= 64)
        x_ND = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        measured, best = [], None
        for row in rows:
            before = install(module, table, key, row)
            best = best or before
            try:
                graph = capture(lambda layers=layers, x_ND=x_ND: [layer.both(x_ND) for layer in layers])
            except Exception as error:  # a tile that does not fit the chip
                results.append({"tuned": name, "row": str(row), "error": str(error).splitlines()[0][:100]})
                continue
            times = {}
            for sparsity in (0.5, 0.8, 0.9):
                rounds = []
                for _ in range(5):
                    for layer in layers:
                        layer.draw(sparsity)
                    rounds.append(1e3 * elapsed_ms(graph.replay) / len(layers))
                times[f"{sparsity:.0%}"] = statistics.median(rounds)
            measured.append({"tuned": name, "row": str(row), "sum_us": sum(times.values()), **times})
        measured.sort(key=lambda row: row["sum_us"])
        # Later measurements of the same run use the fastest rows.
        install(module, table, key, next((row for row in rows if measured and str(row) == measured[0]["row"]), best))
        results += measured
    prefill.GROUPED_COST_16THS = cost
    return results


if __name__ == "__main__":
    compile_every(int(sys.argv[1]), int(sys.argv[2]))

"""The triton backend against torch's dense FFN on a GPU: one CSV row per figure, beside what bytes alone would allow.

python benchmarks/triton_ffn.py --csv gpu.csv     # what `nox -s gpu` runs
python benchmarks/triton_ffn.py --predict         # predicted figures only, needs no GPU

Dense, router and experts are captured in a CUDA graph each, over as many layers as keep the weights well above the
cache, and replayed in turns; masks are drawn anew for every round. The router's own mask is not used, so that each
sparsity can be had; its time is in `ratio`.
"""

import argparse
import csv
import datetime
import itertools
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable

import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.roofline import GPUS, predict

EXPERT_SIZE = 32
SHAPES = {
    "llama2-7b": {"width": 4096, "neurons": 11008, "gated": True},
    "smollm2-135m": {"width": 576, "neurons": 1536, "gated": True},
    "roberta-base": {"width": 768, "neurons": 3072, "gated": False},
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WARM_UP = 3


class Layer:
    """One FFN with random weights, its router, and a mask that the captured graphs read."""

    def __init__(self, width: int, neurons: int, gated: bool, dtype: torch.dtype, tokens: int) -> None:
        experts = neurons // EXPERT_SIZE
        blocks = [torch.randn(experts, EXPERT_SIZE, width, dtype=dtype, device="cuda") / 64 for _ in range(2 + gated)]
        self.weights = ExpertWeights(blocks[0], blocks[1], "silu" if gated else "gelu", *blocks[2:])
        # As a Linear of the dense model has it.
        self.dense_down_DF = blocks[1].flatten(0, 1).t().contiguous()
        self.router_ED = torch.randn(experts, width, dtype=dtype, device="cuda") / 64
        self.mask_NE = torch.ones(tokens, experts, dtype=torch.bool, device="cuda")

    def dense(self, x_ND: torch.Tensor) -> torch.Tensor:
        hidden_NF = functional.linear(x_ND, self.weights.up_ESD.flatten(0, 1))
        activation = ACTIVATIONS[self.weights.activation]
        if self.weights.gate_ESD is None:
            hidden_NF = activation(hidden_NF)
        else:
            hidden_NF = activation(functional.linear(x_ND, self.weights.gate_ESD.flatten(0, 1))) * hidden_NF
        return functional.linear(hidden_NF, self.dense_down_DF)

    def router(self, x_ND: torch.Tensor) -> torch.Tensor:
        from lte_lightning.kernels.triton.router import route_triton

        return route_triton(x_ND, self.router_ED, None, 0.5)

    def experts(self, x_ND: torch.Tensor) -> torch.Tensor:
        from lte_lightning.kernels.triton.ffn import run_triton

        return run_triton(x_ND, self.mask_NE, self.weights)


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Compiles and warms up on a stream of its own, then captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay, by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(shape: str, dtype: str, tokens: int, sparsities: list[float], rounds: int) -> list[dict[str, object]]:
    """The rows of one shape, type and number of tokens."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    size = SHAPES[shape]
    layer_bytes = (2 + size["gated"]) * size["width"] * size["neurons"] * DTYPES[dtype].itemsize
    count = math.ceil(4 * properties.L2_cache_size / layer_bytes)
    layers = [Layer(**size, dtype=DTYPES[dtype], tokens=tokens) for _ in range(count)]
    x_ND = torch.randn(tokens, size["width"], dtype=DTYPES[dtype], device="cuda")
    graphs = {
        name: capture(lambda name=name: [getattr(layer, name)(x_ND) for layer in layers])
        for name in ("dense", "router", "experts")
    }
    # By model number. Of a variant with another bandwidth the bound is the same as long as memory sets it.
    gpu = next((gpu for name, gpu in GPUS.items() if re.search(r"\w*\d+\w*", name)[0] in properties.name), None)
    rows = []
    for sparsity in sparsities:
        times: dict[str, list[float]] = {name: [] for name in graphs}
        idle = []
        for i in range(WARM_UP + rounds):
            for layer in layers:
                layer.mask_NE.copy_(torch.rand(layer.mask_NE.shape, device="cuda") >= sparsity)
                idle.append(layer.mask_NE.any(dim=0).logical_not().float().mean().item())
            for name, graph in graphs.items():
                elapsed = replay_ms(graph) / count
                if i >= WARM_UP:
                    times[name].append(elapsed)
        dense_ms, router_ms, experts_ms = (statistics.median(values) for values in times.values())
        ratio = dense_ms / (experts_ms + router_ms)
        row = {
            "shape": shape, "scope": "ffn", "phase": "decode" if tokens <= 64 else "prefill", "dtype": dtype,
            "tokens": tokens, "sparsity": sparsity, "backend": "triton", "dense_ms": dense_ms,
            "ms": experts_ms + router_ms, "ratio": ratio, "router_ms": router_ms, "bound": "", "share_of_bound": "",
            "gpu": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
            "triton": triton.__version__, "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }  # fmt: skip
        if gpu is not None:
            row["bound"] = predict(
                gpu, **size, expert_size=EXPERT_SIZE, bytes_per_weight=DTYPES[dtype].itemsize, tokens=tokens,
                sparsity=sparsity, union_sparsity=min(sparsity, statistics.mean(idle)),
            ).ratio  # fmt: skip
            row["share_of_bound"] = ratio / row["bound"]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--dtype", default="bf16,f32", help="default: %(default)s")
    parser.add_argument("--tokens", default="1,4,16,64,512,4096", help="default: %(default)s")
    parser.add_argument("--sparsity", default="0,0.25,0.5,0.65,0.8,0.9,0.95", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    parser.add_argument("--csv", help="file for the rows, which are on the screen too")
    parser.add_argument("--predict", action="store_true", help="print predicted figures for known GPUs, run nothing")
    args = parser.parse_args(argv)
    sparsities = [float(value) for value in args.sparsity.split(",")]
    subjects = list(itertools.product(args.shape.split(","), args.dtype.split(","), map(int, args.tokens.split(","))))
    if args.predict:
        for name, (shape, dtype, tokens), sparsity in itertools.product(GPUS, subjects, sparsities):
            prediction = predict(
                GPUS[name], **SHAPES[shape], expert_size=EXPERT_SIZE, bytes_per_weight=DTYPES[dtype].itemsize,
                tokens=tokens, sparsity=sparsity,
            )  # fmt: skip
            print(f"{name}, {shape} {dtype}, tokens {tokens}, sparsity {sparsity:.0%}: {prediction}")
        return
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --predict prints predicted figures")

    rows: list[dict[str, object]] = []
    for shape, dtype, tokens in subjects:
        for row in measure(shape, dtype, tokens, sparsities, args.rounds):
            print(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
                )
            )
            rows.append(row)
        if args.csv:
            # After each subject: what was measured stays, should a later one fail.
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Times dense and sparse FFNs of one shape: many layers in a CUDA graph, above the cache, with new masks each round."""

import math
import statistics
from typing import Any

import torch
from timing import WARM_UP, capture, elapsed_ms
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.roofline import GPUS, predict

EXPERT_SIZE = 32
SHAPES = {
    "llama2-7b": {"width": 4096, "neurons": 11008, "gated": True},
    "smollm2-135m": {"width": 576, "neurons": 1536, "gated": True},
    "roberta-base": {"width": 768, "neurons": 3072, "gated": False},
}
SPARSITIES = (0.0, 0.5, 0.8, 0.9)


class Layer:
    """One FFN with random weights, its router, and a mask that the captured graphs read."""

    def __init__(self, width: int, neurons: int, gated: bool, dtype: torch.dtype, tokens: int) -> None:
        experts = neurons // EXPERT_SIZE
        blocks = [torch.randn(experts, EXPERT_SIZE, width, dtype=dtype, device="cuda") / 64 for _ in range(2 + gated)]
        self.weights = ExpertWeights(blocks[0], blocks[1], "silu" if gated else "gelu", *blocks[2:])
        # The layout of a Linear in the dense model.
        self.dense_down_DF = blocks[1].flatten(0, 1).t().contiguous()
        self.threshold = torch.tensor(0.5, device="cuda")
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

        return route_triton(x_ND, self.router_ED, None, self.threshold)

    def experts(self, x_ND: torch.Tensor) -> torch.Tensor:
        from lte_lightning.kernels.triton.ffn import run_triton

        return run_triton(x_ND, self.mask_NE, self.weights)

    def both(self, x_ND: torch.Tensor) -> torch.Tensor:
        self.router(x_ND)
        return self.experts(x_ND)

    def draw(self, sparsity: float) -> None:
        self.mask_NE.copy_(torch.rand(self.mask_NE.shape, device="cuda") >= sparsity)


def make_layers(shape: str, dtype: torch.dtype, tokens: int, least: int = 16, above_cache: bool = True) -> list[Layer]:
    """Makes at least ``least`` layers, enough to exceed the cache well; exactly ``least`` without ``above_cache``."""
    size = SHAPES[shape]
    if not above_cache:
        return [Layer(**size, dtype=dtype, tokens=tokens) for _ in range(least)]
    layer_bytes = (2 + size["gated"]) * size["width"] * size["neurons"] * dtype.itemsize
    count = max(least, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / layer_bytes))
    return [Layer(**size, dtype=dtype, tokens=tokens) for _ in range(count)]


def measure(shape: str, dtype: torch.dtype, tokens: int, rounds: int = 15) -> list[dict[str, Any]]:
    """Returns the rows of one shape, type and number of tokens; dense and sparse graphs replay in turns."""
    # Many tokens fill the device by themselves, and need no further layers to exceed the cache.
    layers = make_layers(shape, dtype, tokens, 16 if tokens <= 64 else 4)
    x_ND = torch.randn(tokens, SHAPES[shape]["width"], dtype=dtype, device="cuda")
    graphs = {
        name: capture(lambda name=name: [getattr(layer, name)(x_ND) for layer in layers])
        for name in ("dense", "router", "both")
    }
    rows = []
    for sparsity in SPARSITIES:
        times: dict[str, list[float]] = {name: [] for name in graphs}
        idle = []
        for i in range(WARM_UP + rounds):
            for layer in layers:
                layer.draw(sparsity)
            if i == 0:
                idle = [layer.mask_NE.any(dim=0).logical_not().float().mean().item() for layer in layers]
            for name, graph in graphs.items():
                elapsed = elapsed_ms(graph.replay) / len(layers)
                if i >= WARM_UP:
                    times[name].append(elapsed)
        dense_ms, router_ms, ms = (statistics.median(values) for values in times.values())
        name = torch.cuda.get_device_name(0)
        gpu = next((GPUS[key] for key in GPUS if key.split()[0] in name), None)
        row = {"shape": shape, "tokens": tokens, "sparsity": sparsity, "dense_us": 1e3 * dense_ms, "us": 1e3 * ms,
               "router_us": 1e3 * router_ms, "ratio": dense_ms / ms}  # fmt: skip
        if gpu is not None:
            bound = predict(
                gpu, **SHAPES[shape], expert_size=EXPERT_SIZE, bytes_per_weight=dtype.itemsize, tokens=tokens,
                sparsity=sparsity, union_sparsity=min(sparsity, statistics.mean(idle)),
            )  # fmt: skip
            row |= {"bound": bound.ratio, "share_of_bound": row["ratio"] / bound.ratio,
                    "share_of_bandwidth": (bound.ffn_ms + bound.router_ms) / ms}  # fmt: skip
        rows.append(row)
    return rows


def profile() -> list[dict[str, Any]]:
    """Returns the microseconds of each kernel in one call of LLaMA-2-7B's FFN, its router included."""
    rows = []
    for tokens in (1, 4, 16, 64, 512, 4096):
        layers = make_layers("llama2-7b", torch.bfloat16, tokens, 4, above_cache=False)
        x_ND = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        for sparsity in (0.0, 0.5, 0.8, 0.9):
            for layer in layers:
                layer.draw(sparsity)
                layer.both(x_ND)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                for layer in layers:
                    layer.both(x_ND)
                torch.cuda.synchronize()
            for event in profiler.key_averages():
                rows.append({"tokens": tokens, "sparsity": sparsity, "kernel": event.key[:60],
                             "us": event.device_time_total / len(layers)})  # fmt: skip
    return rows

"""Times a LLaMA-2-7B-shaped FFN with weights of 16, 8 and 4 bits at each sparsity (random weights, no router).

    python benchmarks/quantized_ffn.py --tokens 1,4 --threads 2

The script interleaves the types call by call, and keeps all weights out of the cache. With one thread it measures
processor time, because machines are rarely quiet. With several threads it measures wall-clock time.
"""

import argparse
import os
import statistics
import time

import torch

from lte_lightning.kernels.cpu.ffn import run_cpu
from lte_lightning.kernels.cpu.quantized import run_quantized
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.quantized import Quantized, QuantizedExperts, Shape

E, S, D = 344, 32, 4096


def matrix(shape: Shape, steps: int) -> Quantized:
    blocks = torch.randint(0, 255, (*shape.blocks, steps, 16, 4), dtype=torch.uint8)
    return Quantized(blocks, (torch.rand(*shape.blocks, 16) * 1e-3).bfloat16(), shape)


def quantized(steps: int) -> QuantizedExperts:
    rows, columns = Shape(E, S, 1, D), Shape(1, D, E, S)
    return QuantizedExperts(matrix(rows, steps), matrix(columns, steps), "silu", matrix(rows, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--sparsity", default="0,0.5,0.8,0.9")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    up, down, gate = (torch.randn(E, S, D).bfloat16() for _ in range(3))
    weights = ExpertWeights(up, down, "silu", gate)  # 270 MB
    bytes_, halves = [quantized(8) for _ in range(2)], [quantized(4) for _ in range(3)]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    runs = {
        "bf16": lambda i, x, mask: run_cpu(x, mask, weights),
        "int8": lambda i, x, mask: run_quantized(x, mask, bytes_[i % 2]),
        "int4": lambda i, x, mask: run_quantized(x, mask, halves[i % 3]),
    }
    for tokens in map(int, options.tokens.split(",")):
        for sparsity in map(float, options.sparsity.split(",")):
            times: dict[str, list[float]] = {name: [] for name in runs}
            for i in range(options.repeats + 1):
                mask_NE = torch.rand(tokens, E).argsort(dim=-1) < round((1 - sparsity) * E)
                x_ND = torch.randn(tokens, D).bfloat16()
                for name, run in runs.items():
                    start = clock()
                    run(i, x_ND, mask_NE)
                    times[name] += [1e3 * (clock() - start)] * (i > 0)
            found = {name: statistics.median(each) for name, each in times.items()}
            line = ", ".join(f"{name} {ms:.2f} ms ({found['bf16'] / ms:.1f}x)" for name, ms in found.items())
            print(f"{tokens} tokens, {sparsity:.0%}: {line}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()

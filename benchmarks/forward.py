"""Measures Python's share of an FFN's forward pass on the cpu backend, apart from its router and its kernel.

python benchmarks/forward.py            # one FFN so small that its arithmetic takes no time, 1 token, 1 thread
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModel, LlamaConfig

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import run_compiled


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """Returns the processor time of a call: the least over rounds of 100 calls, which busy neighbours disturb least."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(100):
            call()
        times.append(time.process_time() - start)
    return 1e4 * min(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="rounds of 100 calls (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = lte_lightning.convert(AutoModel.from_config(config).eval(), lte_lightning.LteConfig(grouping="contiguous"))
    (ffn,) = expert_ffns(model).values()
    x_BTD = torch.randn(1, 1, 32)
    lte_lightning.set_mode(model, "hard")
    masked = microseconds(lambda: ffn(x_BTD), args.rounds)
    lte_lightning.set_backend(model, "cpu")
    whole = microseconds(lambda: ffn(x_BTD), args.rounds)
    weights, lib = ffn.prepare(x_BTD).weights, library()
    if weights is None or lib is None:
        raise SystemExit("the cpu backend does not run here")
    x_ND, mask_NE = x_BTD[0], (ffn.selector(x_BTD) > ffn.threshold)[0]
    router = microseconds(lambda: ffn.selector(x_BTD), args.rounds)
    kernel = microseconds(lambda: run_compiled(lib, x_ND, mask_NE, weights), args.rounds)
    print(
        f"one FFN on the cpu backend {whole:.0f} us: router {router:.0f}, kernel with its call {kernel:.0f}, all else "
        f"{whole - router - kernel:.0f}; on dense-mask {masked:.0f} us (torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()

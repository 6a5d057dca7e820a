"""Measures tokens per second of a language model: dense, sparse, quantised, and in llama.cpp if xllamacpp is installed.

    python benchmarks/decode.py --model SmolLM2-135M --threads 2

The script interleaves the arms round by round. Each arm decodes the same number of tokens after the same prompt.
Experts are neighbouring neurons. The script sets each router's bias so that an expert runs for the wanted share of
tokens. That is enough to measure speed and says nothing about quality. The eager arms call transformers' own model
with a growing cache. A compiled arm has a static cache and one graph; so has a step that AOTInductor compiled ahead
of time, which runs without torch's guards. A fused arm has a static cache too (docs/speed.md). llama.cpp runs the same
dense weights and reports its own rate.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from lte_lightning.bench.decoding import Arm, decoder, even_routers, sparse_twin
from lte_lightning.bench.llama_cpp import llama_cpp
from lte_lightning.export.gguf import write_gguf


def ahead_of_time(model: Any, prompt_BT: torch.Tensor, tokens: int) -> Arm:
    """Returns an arm that decodes greedily with a step that AOTInductor has compiled."""
    model.generation_config.cache_implementation = "static"
    length = prompt_BT.shape[1] + tokens
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=length, device=torch.device("cpu"))
    example = {"input_ids": prompt_BT[:, :1], "cache_position": torch.tensor([0])}
    program = torch.export.export(module, (), example, strict=True)
    step = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))

    def arm() -> float:
        read = prompt_BT.shape[1]
        for place in range(read):
            logits_BTV = step(input_ids=prompt_BT[:, place : place + 1], cache_position=torch.tensor([place]))
        start = time.perf_counter()
        for place in range(read, length):
            logits_BTV = step(input_ids=logits_BTV.argmax(dim=-1), cache_position=torch.tensor([place]))
        return tokens / (time.perf_counter() - start)

    return arm


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a plain model's folder or hub id")
    parser.add_argument("--kinds", default="bf16,int8,int4")
    parser.add_argument("--sparsity", default="0,0.5,0.8,0.9")
    parser.add_argument("--compiled", default="", help="kinds that are measured compiled, too")
    parser.add_argument("--ahead", default="", help="kinds that AOTInductor compiles ahead of time, too")
    parser.add_argument("--fused", default="", help="quantised kinds that are measured in fused_decoding, too")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    prompt_BT = torch.randint(100, 1000, (1, options.prompt))
    sample_BT = torch.randint(100, 1000, (1, 200))
    arms = {"dense bf16, eager": decoder(dense, prompt_BT, options.tokens)}
    for kind in options.kinds.split(","):
        for sparsity in map(float, options.sparsity.split(",")):
            model = sparse_twin(copy.deepcopy(dense), kind)
            even_routers(model, sparsity, {"input_ids": sample_BT})
            ways = {"eager": kind, "compiled": options.compiled, "ahead of time": options.ahead, "fused": options.fused}
            for way, kinds in ways.items():
                if kind in kinds.split(","):
                    arm = ahead_of_time if way == "ahead of time" else partial(decoder, way=way)
                    arms[f"ours {kind}, {sparsity:.0%}, {way}"] = arm(model, prompt_BT, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("xllamacpp") is None:
            print("llama.cpp is not measured: pip install xllamacpp")
        else:
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            for dtype in ("q8_0", "q4_0"):
                write_gguf(dense, tokenizer, Path(folder, f"{dtype}.gguf"), dtype)
                arms[f"llama.cpp {dtype}"] = llama_cpp(
                    Path(folder, f"{dtype}.gguf"), prompt_BT, options.tokens, options.threads
                )
        rates: dict[str, list[float]] = {name: [] for name in arms}
        order, generator = list(arms), random.Random(0)
        for i in range(options.repeats + 1):  # the first round compiles and does not count
            generator.shuffle(order)
            for name in order:
                rate = arms[name]()
                if i:
                    rates[name].append(rate)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {options.threads} threads, {options.tokens} tokens, load {load:.1f}")
    base = statistics.median(rates["dense bf16, eager"])
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"{name:32} {rate:7.1f} tokens/s [{min(found):.1f} .. {max(found):.1f}]  {rate / base:.2f}x dense bf16")


if __name__ == "__main__":
    main()

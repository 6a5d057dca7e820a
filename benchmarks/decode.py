"""Tokens per second of a whole language model: dense, sparse, quantised, and llama.cpp's if xllamacpp is installed.

    python benchmarks/decode.py --model SmolLM2-135M --threads 2

Arms are interleaved round by round: each decodes the same number of tokens behind the same prompt. Experts are
neighbouring neurons, and each router's bias is set so that an expert runs for the wanted share of tokens: that is
enough for speed, and says nothing of quality. The eager arms are transformers' own model calls with a growing cache. A
compiled arm has a static cache and one graph (docs/speed.md). llama.cpp runs the same dense weights, and tells its
own rate.
"""

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from lte_lightning import LteConfig, convert, quantize, set_backend, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.export.gguf import write_gguf

Arm = Callable[[], float]


def sparse_model(dense: Any, kind: str, sparsity: float, ids_BT: torch.Tensor) -> Any:
    model = convert(copy.deepcopy(dense), LteConfig(grouping="contiguous", router_margin=0.0), progress=False)
    set_mode(model, "hard")
    for ffn in expert_ffns(model).values():
        ffn.selector.to(dense.dtype)
    set_backend(model, "auto")
    if kind != "bf16":
        quantize(model, kind)

    def set_bias(ffn: Any, inputs: Any) -> None:
        weight_ED, bias_E = ffn.selector.linear()
        logits_NE = torch.nn.functional.linear(inputs[0].flatten(0, -2), weight_ED).float()
        bias_E.data.copy_(-logits_NE.quantile(sparsity, dim=0) + (1e-3 if sparsity == 0 else 0.0))

    hooks = [ffn.register_forward_pre_hook(set_bias) for ffn in expert_ffns(model).values()]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    return model


def decoder(model: Any, prompt_BT: torch.Tensor, tokens: int, compiled: bool) -> Arm:
    step = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model.forward

    def arm() -> float:
        options: dict[str, Any] = {"use_cache": True}
        if compiled:
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + tokens + 1)
        outputs = model(prompt_BT, **options)
        cache, start = outputs.past_key_values, time.perf_counter()
        for _ in range(tokens):
            next_BT = outputs.logits[:, -1:].argmax(dim=-1)
            outputs = step(next_BT, past_key_values=cache, use_cache=True)
        return tokens / (time.perf_counter() - start)

    return arm


def llama_cpp(file: Path, prompt_BT: torch.Tensor, tokens: int, threads: int) -> Arm:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, threads
    params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    body = {"prompt": prompt_BT[0].tolist(), "n_predict": tokens, "temperature": 0, "ignore_eos": True}

    def arm() -> float:
        data = json.dumps(body | {"cache_prompt": False}).encode()
        request = urllib.request.Request(
            server.listening_address + "/completion", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            rate: float = json.loads(answer.read())["timings"]["predicted_per_second"]
        return rate

    return arm


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a plain model's folder or hub id")
    parser.add_argument("--kinds", default="bf16,int8,int4")
    parser.add_argument("--sparsity", default="0,0.5,0.8,0.9")
    parser.add_argument("--compiled", default="", help="kinds that are measured compiled, too")
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
    arms = {"dense bf16, eager": decoder(dense, prompt_BT, options.tokens, False)}
    for kind in options.kinds.split(","):
        for sparsity in map(float, options.sparsity.split(",")):
            model = sparse_model(dense, kind, sparsity, sample_BT)
            for compiled in (False, True)[: 1 + (kind in options.compiled.split(","))]:
                name = f"ours {kind}, {sparsity:.0%}, {'compiled' if compiled else 'eager'}"
                arms[name] = decoder(model, prompt_BT, options.tokens, compiled)
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
        for i in range(options.repeats + 1):  # the first round compiles, and is not counted
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
        print(f"{name:28} {rate:7.1f} tokens/s [{min(found):.1f} .. {max(found):.1f}]  {rate / base:.2f}x dense bf16")


if __name__ == "__main__":
    main()

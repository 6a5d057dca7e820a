"""Measures the perplexity of a language model with 8-bit and 4-bit weights, and with its own weights.

    python benchmarks/quantized.py --model SmolLM2-135M --text wiki.txt --tokens 8192

The script cuts the text into windows. The model predicts each token of a window but the first from those before it.
Every neuron runs (mode dense), so only rounding differs. The quantised models use the kernels' own products, with
rounded inputs.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lte_lightning import LteConfig, convert, quantize


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows_WT: torch.Tensor) -> float:
    total = 0.0
    for ids_T in windows_WT:
        logits_TV = model(ids_T[None]).logits[0, :-1].float()
        total += functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum").item()
    return math.exp(total / (windows_WT.shape[0] * (windows_WT.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a plain model's folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", default="bf16,int8,int4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt")["input_ids"][0, : options.tokens]
    windows_WT = ids[: len(ids) // options.window * options.window].view(-1, options.window)
    print(f"{options.model}, {windows_WT.numel()} tokens of {options.text.name} in windows of {options.window}")
    for kind in options.kinds.split(","):
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        if kind not in ("f32", "bf16"):
            convert(model, LteConfig(grouping="contiguous"), progress=False)
            quantize(model, kind)
        print(f"{kind}: perplexity {perplexity(model, windows_WT):.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Writes a model folder of a named shape: random weights, and another model's tokenizer, which llama.cpp needs.

    python benchmarks/shaped.py --shape llama2-7b --layers 8 --tokenizer SMOLLM2 --out /tmp/shaped
    lte bench /tmp/shaped --against llama.cpp,openvino --dtype int8,int4 --sparsity 0.8 --ways eager,fused --threads 2

The second command compares it with other engines. It sets the routers to the sparsity, which says nothing of quality.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lte_lightning.bench.subject import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="llama2-7b", choices=[n for n, c in SHAPES.items() if c.model_type == "llama"]
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokenizer", required=True, help="a folder or hub id; its vocabulary is the model's")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = copy.deepcopy(SHAPES[options.shape])
    config.num_hidden_layers, config.vocab_size = options.layers, len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()

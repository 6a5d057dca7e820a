"""Times a training step with the head at labelled positions only against one with all, interleaved in one process.

python benchmarks/head.py            # the first six layers of a model of SmolLM2-135M's sizes, 8 x 96 tokens
"""

import argparse
import os
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lte_lightning.core.model.head import IGNORED, run_where_asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per row (default: %(default)s)")
    parser.add_argument("--answer", type=float, default=0.4, help="share of tokens with a label (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, num_hidden_layers=args.layers, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids_BT = torch.randint(config.vocab_size, (args.batch, args.tokens))
    prompt = args.tokens - round(args.answer * args.tokens)
    batch = {"input_ids": ids_BT, "labels": ids_BT.masked_fill(torch.arange(args.tokens) < prompt, IGNORED)}
    ways = {"all logits": lambda: model(**batch), "where asked": lambda: run_where_asked(model, batch)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(args.steps + 2):
        for way, run in ways.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss = run().loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i >= 2:
                seconds[way].append(time.perf_counter() - start)
    head = model.lm_head.weight.numel()
    body = sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name)
    print(
        f"{args.layers} layers, {args.batch} x {args.tokens} tokens, labels on {args.answer:.0%}, {args.precision}, "
        f"{args.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; "
        f"bound by FLOPs of projections: {(body + head) / (body + args.answer * head):.2f}x"
    )
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    for way, values in seconds.items():
        print(f"{way:12s} {1e3 * statistics.median(values):8.0f} ms")
    print(f"{statistics.median(ratios):.2f}x (quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f})")


if __name__ == "__main__":
    main()

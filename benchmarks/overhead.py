"""Measures the cost of experts in training: soft and hard steps against a dense step, interleaved in one process.

python benchmarks/overhead.py            # MiniLM of the quickstart, batch 32 x 32 tokens, 2 threads
"""

import argparse
import copy
import os
import statistics
import time

import torch
from transformers import AutoModelForSequenceClassification

import lte_lightning
from lte_lightning.core.accounting.cost import flops_per_token
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.data.packaged import MODEL, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="folder, hub id or package:// path (default: the quickstart's)")
    parser.add_argument("--batch", type=int, default=32, help="rows per step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per mode (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    dense = AutoModelForSequenceClassification.from_pretrained(resolve(args.model), num_labels=2).train()
    models = {"dense": dense}
    for mode in ("soft", "hard"):
        config = lte_lightning.LteConfig(grouping="contiguous")
        models[mode] = lte_lightning.convert(copy.deepcopy(dense), config)
        lte_lightning.set_mode(models[mode], mode)
    for parameter in selector_parameters(models["hard"]):
        parameter.requires_grad_(False)
    optimizers = {mode: torch.optim.AdamW(model.parameters(), lr=1e-5) for mode, model in models.items()}
    ids_BT = torch.randint(5, dense.config.vocab_size, (args.batch, args.tokens))
    batch = {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": torch.randint(0, 2, (args.batch,)),
    }

    def step(mode: str) -> None:
        optimizers[mode].zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            if mode == "soft":
                with lte_lightning.RouterTrace(models[mode], batch["attention_mask"]) as trace:
                    loss = models[mode](**batch).loss
                loss = loss + 0.5 * trace.efficiency_loss() + 0.5 * trace.separability_loss()
            else:
                loss = models[mode](**batch).loss
        loss.backward()
        optimizers[mode].step()

    seconds: dict[str, list[float]] = {mode: [] for mode in models}
    for i in range(args.steps + 3):
        for mode in models:  # interleaved, so that a busy moment hits all three
            start = time.perf_counter()
            step(mode)
            if i >= 3:
                seconds[mode].append(time.perf_counter() - start)

    converted = models["soft"]
    router_share = flops_per_token(converted, [0.0] * converted.config.num_hidden_layers) / flops_per_token(converted)
    print(
        f"batch {args.batch} x {args.tokens}, {args.precision}, {args.threads} threads, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}; bound by FLOPs (the router's): {router_share:.3f}x"
    )
    for mode, values in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(values, seconds["dense"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{mode:6s} {1e3 * statistics.median(values):8.1f} ms   {statistics.median(ratios):.3f}x dense "
            f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
        )


if __name__ == "__main__":
    main()

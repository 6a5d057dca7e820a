"""Measures how much time skipping experts saves in the expert stage: dense, masked and skipping steps, interleaved.

python benchmarks/training.py                                   # RoBERTa-base's shape, 32 x 128 tokens, float32
python benchmarks/training.py --model llama --batch 4           # SmolLM2-135M's shape, 4 x 128 tokens
python benchmarks/training.py --dtype bfloat16 --threads 1

The weights are random, and each layer's threshold sets its sparsity. A step is forward, backward and AdamW. `skips` of
kernels/skipping.py relies on the sparsities at which the last column exceeds 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModel, LlamaConfig, RobertaConfig

import lte_lightning
from lte_lightning.core.model import prepared
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.knob import find_thresholds

MODELS = {
    "roberta": lambda layers: RobertaConfig(num_hidden_layers=layers),
    "llama": lambda layers: LlamaConfig(
        num_hidden_layers=layers, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="roberta", help="shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="how many of its layers (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.8, 0.9], metavar="SHARE")
    parser.add_argument("--batch", type=int, default=32, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each kind (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    prepared.skips = lambda mask_NE, dtype: True
    config = MODELS[args.model](args.layers)
    model = AutoModel.from_config(config, dtype=getattr(torch, args.dtype)).train()
    lte_lightning.convert(model, lte_lightning.LteConfig(grouping="contiguous"), progress=False)
    for parameter in selector_parameters(model):
        parameter.requires_grad_(False)
    ids_BT = torch.randint(5, config.vocab_size, (args.batch, args.tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=ids_BT).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    print(
        f"{args.model}, {args.layers} layers, {args.batch} x {args.tokens} tokens, {args.dtype}, {args.threads} threads"
    )
    print("sparsity   dense  masked  skipping [s]   dense / skipping   masked / skipping")
    for sparsity in args.sparsity:
        set_sparsity(model, ids_BT, sparsity)
        kinds: dict[str, Callable[[], None]] = {
            "dense": lambda: lte_lightning.set_mode(model, "dense"),
            "masked": lambda: set_hard(model, skips=False),
            "skipping": lambda: set_hard(model, skips=True),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds + 1):
            for kind, set_up in kinds.items():
                set_up()
                times[kind].append(step())
        dense, masked, skipping = (statistics.median(seconds[1:]) for seconds in times.values())
        print(
            f"{sparsity:8.0%} {dense:7.3f} {masked:7.3f} {skipping:9.3f}"
            f"{dense / skipping:19.2f}{masked / skipping:20.2f}"
        )


def set_hard(model: torch.nn.Module, skips: bool) -> None:
    lte_lightning.set_mode(model, "hard")
    for ffn in expert_ffns(model).values():
        ffn.skips_in_training = skips


def set_sparsity(model: torch.nn.Module, ids_BT: torch.Tensor, sparsity: float) -> None:
    """Sets each layer's threshold to a quantile of its own scores."""
    thresholds = [0.0] * len(expert_ffns(model))
    if sparsity:
        batch = (lambda: model(input_ids=ids_BT), (torch.ones_like(ids_BT),))
        (setting,) = find_thresholds(model, [batch], [sparsity], "equal").settings
        thresholds = setting.thresholds
    for ffn, threshold in zip(expert_ffns(model).values(), thresholds, strict=True):
        ffn.threshold = threshold


if __name__ == "__main__":
    main()

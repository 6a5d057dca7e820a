r"""Measures how well the predictors of baselines rank, for each training loss: the tables of docs/baselines.md.

    lightning fit --config conf/quickstart.yaml --stages.dense.epochs 1 --stages.router.epochs 0 \
      --stages.expert.epochs 0
    python benchmarks/imitation.py runs/quickstart/RUN/model

The script prints a percentage for three layers of a model: the share of all |activation| that a predictor keeps at
80 % sparsity on validation rows. For D2DMoE it is the share of the experts' output norms. The model may come from
``--model.activation relu`` or keep its activation. One core needs about ten minutes.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn import functional

from lte_lightning import LteConfig, from_pretrained, restore
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.storage import activation_name
from lte_lightning.core.routing.observe import observe
from lte_lightning.data import MovieReviews
from lte_lightning.selection import SELECTORS, Activity, FfnShape

SPARSITY, RATE, TOKENS = 0.8, 0.01, 512
EXPERT_SIZES = {"dejavu": 1, "moefication": 32, "d2dmoe": 32}


def activity_of(model: Any, layer: int, batches: Sequence[dict[str, torch.Tensor]]) -> Activity:
    """Returns the activity of one FFN of a converted model on the real tokens of batches."""
    ffn, seen = list(expert_ffns(model).values())[layer], []
    for batch in batches:
        mask_BT = batch["attention_mask"]
        with torch.no_grad(), observe(model, lambda each, did: seen.append(did) if each is ffn else None, mask_BT):
            model(input_ids=batch["input_ids"], attention_mask=mask_BT)
    rows = [torch.cat([getattr(did, name) for did in seen]) for name in ("x_ND", "gate_NF", "hidden_NF")]
    return Activity(*rows, seen[0].first_FD.clone(), seen[0].down_FD.clone())


def kept(predictor: Any, did: Activity, name: str) -> tuple[float, float]:
    """Returns the share that the predictor keeps, and the share that an oracle keeps."""
    with torch.no_grad():
        mass_NE, importance_NE = predictor.magnitude(did.hidden_NF), predictor.importance(did.x_ND)
        chosen_NE = torch.zeros_like(importance_NE).scatter(1, importance_NE.topk(predictor.keep).indices, 1.0)
        if name == "d2dmoe":
            down_ESD = did.down_FD.unflatten(0, (predictor.shape.experts, -1))
            hidden_NES = did.hidden_NF.unflatten(1, (predictor.shape.experts, -1))
            mass_NE = torch.stack([(hidden_NES[:, e] @ down_ESD[e]).norm(dim=1) for e in range(len(down_ESD))], 1)
            chosen_NE = (importance_NE >= importance_NE.flatten().quantile(SPARSITY)).float()
        best_NE = mass_NE.topk(predictor.keep).values
    return float((mass_NE * chosen_NE).sum() / mass_NE.sum()), float(best_NE.sum() / mass_NE.sum())


def train(predictor: Any, did: Activity, steps: int) -> None:
    """Trains a predictor like the router stage, without weight decay."""
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        rows_N = torch.randint(len(did.x_ND), (TOKENS,), generator=generator)
        part = Activity(did.x_ND[rows_N], did.gate_NF[rows_N], did.hidden_NF[rows_N], did.first_FD, did.down_FD)
        optimizer.zero_grad()
        predictor.imitation_loss(part).backward()
        optimizer.step()


def main() -> None:
    """Prints a row for each method, layer and form of its loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved LTE model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 5])
    args = parser.parse_args()
    model = restore(from_pretrained(args.model, backend="dense-mask")).eval()
    data = MovieReviews(max_length=64, train_rows=3000)
    data.prepare_data()
    data.setup("fit")
    rows = list(islice(data.train_dataloader(), 16)), list(islice(data.val_dataloader(), 1))
    print("method,layer,loss,untrained,trained,oracle")
    for name, size in EXPERT_SIZES.items():
        convert(model, LteConfig(size), progress=False)
        ffn = next(iter(expert_ffns(model).values()))
        own = activation_name(ffn.activation)
        for layer in args.layers:
            seen, held_out = (activity_of(model, layer, batches) for batches in rows)
            ways = [(f"for {form}", form, False) for form in dict.fromkeys((own, "relu"))]  # the authors' is for ReLU
            ways += [("from mean weights", own, True)] if name == "moefication" else []
            for way, form, from_means in ways:
                generator = torch.Generator().manual_seed(0)
                predictor = SELECTORS[name](FfnShape(ffn.width, ffn.experts, activation=form), SPARSITY, generator)
                if from_means:
                    means_ED = functional.normalize(seen.first_FD).unflatten(0, (ffn.experts, -1)).mean(1)
                    predictor.first.data = means_ED
                untrained, _ = kept(predictor, held_out, name)
                train(predictor, seen, args.steps)
                trained, best = kept(predictor, held_out, name)
                print(f"{name},{layer},{way},{100 * untrained:.1f},{100 * trained:.1f},{100 * best:.1f}", flush=True)
        restore(model)


if __name__ == "__main__":
    main()

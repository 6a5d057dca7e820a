"""Hold routers at a target sparsity while they and the model train: integral control of each layer's bias.

After each optimizer step, ``bias += rate * clamp(threshold - q, -2, 2)``. All of these are logits. q is the quantile,
at the wanted sparsity, of the batch's logits over real tokens and experts of a layer: where it lies on the threshold,
the batch had just that sparsity. Routers of mixtures of experts are balanced in a like way, by a step on each expert's
bias: Lean Wang, Huazuo Gao, Chenggang Zhao, Xu Sun, Damai Dai, "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts", 2024, arXiv 2408.15664.
"""

import math

import torch
from torch import nn

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.observe import selectors
from lte_lightning.core.routing.trace import RouterTrace

LIMIT = 2.0
"""The largest distance, in logits, that one step answers to."""
SAMPLE = 1 << 20
"""Scores of a layer that a quantile is taken of; of more, those of evenly spaced tokens."""


def controlled(model: nn.Module) -> bool:
    """Says whether the model's routers are to be held at a target sparsity."""
    return selectors(model)[0].controlled()


def wanted_sparsity(target: float, progress: float) -> float:
    """Returns what is wanted at a point of the router stage: seven eighths of the target rise to it in a quarter.

    Args:
        target: The sparsity wanted in the end.
        progress: Share of the stage that is done; 1 in a later stage.
    """
    return target * (0.875 + 0.125 * min(4.0 * progress, 1.0))


@torch.no_grad()
def distances(model: nn.Module, trace: RouterTrace, sparsity: float) -> torch.Tensor:
    """Returns how far the logits' quantiles lie below the threshold, [L], limited to `LIMIT` either way.

    Args:
        model: A converted model.
        trace: What its routers decided on a batch.
        sparsity: The sparsity wanted.
    """
    found = []
    for ffn, scores_NE in zip(expert_ffns(model).values(), trace.scores().values(), strict=True):
        scores = scores_NE[:: math.ceil(scores_NE.numel() / SAMPLE)].flatten()
        quantile = scores.kthvalue(max(round(sparsity * len(scores)), 1)).values
        found.append(math.log(ffn.threshold / (1.0 - ffn.threshold)) - torch.logit(quantile, eps=1e-6))
    return torch.stack(found).clamp(-LIMIT, LIMIT)


def follow(model: nn.Module, distances_L: torch.Tensor, rate: float) -> None:
    """Moves every layer's logits by a share of their distance."""
    for selector, distance in zip(selectors(model), distances_L, strict=True):
        selector.raise_logits(rate * distance)

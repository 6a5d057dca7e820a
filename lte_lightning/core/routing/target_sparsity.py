"""Hold routers at a target sparsity while they and the model train: integral control of each layer's bias.

After each optimizer step, ``bias += rate * clamp(threshold - q, -2, 2)``, all in logits. q is a quantile of the step's
logits: at the wanted sparsity, over the real tokens and experts of one layer or of all layers. If q equals the
threshold, the step had exactly the wanted sparsity. A similar rule balances mixtures of experts by a step on each
expert's bias: Lean Wang, Huazuo Gao, Chenggang Zhao, Xu Sun, Damai Dai, "Auxiliary-Loss-Free Load Balancing Strategy
for Mixture-of-Experts", 2024, arXiv 2408.15664.

Quantiles are read from histograms, because histograms of several batches and devices add up exactly, in any order.

Shape suffixes: L layers, N real tokens, E experts, H bins of logits, K sparsities.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.swap import lte_config
from lte_lightning.core.routing.observe import selectors
from lte_lightning.core.routing.prune import Batch
from lte_lightning.core.routing.trace import RouterTrace

LIMIT = 2.0
"""The largest distance, in logits, that one step corrects."""
SAMPLE = 1 << 20
"""Scores per layer for a quantile; a layer with more is sampled at evenly spaced tokens."""
SPAN = 16.0
"""Histograms cover logits from -16 to 16."""
BINS = 1 << 15
"""Bins of a histogram: they are 1/1024 wide."""
ROUNDS = 8
"""Default limit on the passes of `shift_to_sparsity` over its batches."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


def controlled(model: nn.Module) -> bool:
    """Whether the model's routers are held at a target sparsity."""
    return selectors(model)[0].controlled()


def wanted_sparsity(target: float, progress: float) -> float:
    """Returns the wanted sparsity at a point of the router stage.

    It rises from seven eighths of the target to the target in the first quarter of the stage.

    Args:
        target: The final sparsity.
        progress: Completed share of the stage; 1 in a later stage.
    """
    return target * (0.875 + 0.125 * min(4.0 * progress, 1.0))


@torch.no_grad()
def histogram(model: nn.Module, trace: RouterTrace) -> torch.Tensor:
    """Returns the number of logits of each layer in each bin, int64 [L, H].

    Args:
        model: A converted model.
        trace: The trace of its routers on a batch.
    """
    places = []
    for layer, scores_NE in enumerate(trace.scores().values()):
        scores = scores_NE[:: math.ceil(scores_NE.numel() / SAMPLE)].flatten()
        bins = ((torch.logit(scores, eps=1e-7) + SPAN) * (BINS / (2 * SPAN))).long()
        places.append(bins.clamp_(0, BINS - 1) + layer * BINS)
    return torch.bincount(torch.cat(places), minlength=len(places) * BINS).view(-1, BINS)


def quantiles(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns a logit for each layer, [L], such that a threshold there gives the model the wanted sparsity.

    ``sparsity_per_layer`` decides how layers share it. ``equal`` takes the quantile of each layer at this sparsity.
    ``free`` takes one quantile of all layers together, so every layer gets the same logit. A list gives each layer its
    own sparsity.

    Args:
        model: A converted model.
        counts_LH: Its logits, from `histogram`.
        sparsity: The wanted sparsity of the model.
    """
    config, layers = lte_config(model), len(counts_LH)
    shares_L = [sparsity] * layers
    if config.sparsity_per_layer == "free":
        counts_LH = counts_LH.sum(0, keepdim=True).expand(layers, -1)
    elif isinstance(config.sparsity_per_layer, list) and config.target_sparsity:  # given for the target
        shares_L = [share * sparsity / config.target_sparsity for share in config.sparsity_per_layer]
    below_LH = counts_LH.cumsum(1)
    wanted_L = (below_LH[:, -1].double().cpu() * torch.tensor(shares_L).clamp(max=1.0).double()).round().clamp(min=1)
    bins_L = (below_LH < wanted_L.to(below_LH).unsqueeze(1)).sum(1)
    return (bins_L + 1) * (2 * SPAN / BINS) - SPAN  # the upper edge: experts with logits in the bin do not run


def gaps(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns how far the quantiles lie below the threshold, [L]; the arguments are those of `quantiles`."""
    tau = next(iter(expert_ffns(model).values())).trained_threshold
    return torch.logit(torch.tensor(tau, dtype=torch.float64)).item() - quantiles(model, counts_LH, sparsity)


def clamped_gaps(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the gaps for one step, [L], clamped to `LIMIT` either way; the arguments are those of `quantiles`."""
    return gaps(model, counts_LH, sparsity).clamp(-LIMIT, LIMIT)


def shift_logits(model: nn.Module, gaps_L: torch.Tensor, rate: float) -> None:
    """Moves every layer's logits by a share, ``rate``, of its distance."""
    for selector, gap in zip(selectors(model), gaps_L, strict=True):
        selector.raise_logits(rate * gap)


@torch.no_grad()
def shift_to_sparsity(
    model: nn.Module,
    batches: Sequence[Batch],
    sparsity: float,
    reduce: Reduce = lambda counts: counts,
    rounds: int = ROUNDS,
) -> torch.Tensor:
    """Moves the routers' logits until the model has the wanted sparsity on these rows, in its present mode.

    A layer's logits depend on the sparsity of earlier layers, so each round reads them again.

    Args:
        model: A converted model with controlled routers, in eval mode, ``soft`` or ``hard``.
        batches: The rows, on this device.
        sparsity: The wanted sparsity.
        reduce: Sums counts over devices.
        rounds: The largest number of passes over the rows.

    Returns:
        The shift of each layer's logits, [L].
    """
    moved_L = torch.zeros(len(selectors(model)))
    for _ in range(rounds):
        counts_LH: torch.Tensor | None = None
        for run, token_masks_BT in batches:
            with RouterTrace(model, *token_masks_BT) as trace:
                run()
            here = histogram(model, trace)
            counts_LH = here if counts_LH is None else counts_LH + here
        assert counts_LH is not None  # a data module has at least one row
        gaps_L = gaps(model, reduce(counts_LH), sparsity)
        shift_logits(model, gaps_L, 1.0)
        moved_L += gaps_L.float().cpu()
        if bool((gaps_L.abs() < 4 * SPAN / BINS).all()):
            break
    return moved_L

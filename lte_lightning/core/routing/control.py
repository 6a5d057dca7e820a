"""Hold routers at a target sparsity while they and the model train: integral control of each layer's bias.

After each optimizer step, ``bias += rate * clamp(threshold - q, -2, 2)``. All of these are logits. q is the quantile,
at the wanted sparsity, of the step's logits over real tokens and experts of a layer, or of all layers: where it lies on
the threshold, the step had just that sparsity. Routers of mixtures of experts are balanced in a like way, by a step on
each expert's bias: Lean Wang, Huazuo Gao, Chenggang Zhao, Xu Sun, Damai Dai, "Auxiliary-Loss-Free Load Balancing
Strategy for Mixture-of-Experts", 2024, arXiv 2408.15664.

Quantiles are read from histograms. Those of several batches and devices add up exactly, in any order.

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
"""The largest distance, in logits, that one step answers to."""
SAMPLE = 1 << 20
"""Scores of a layer that a quantile is taken of; of more, those of evenly spaced tokens."""
SPAN = 16.0
"""Logits between -16 and 16 are told apart."""
BINS = 1 << 15
"""Bins of a histogram: they are 1/1024 wide."""
ROUNDS = 8
"""How often `rest` looks at its batches, at most, unless told otherwise."""

Reduce = Callable[[torch.Tensor], torch.Tensor]


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
def histogram(model: nn.Module, trace: RouterTrace) -> torch.Tensor:
    """Returns how many logits of each layer fall in each bin, int64 [L, H].

    Args:
        model: A converted model.
        trace: What its routers decided on a batch.
    """
    places = []
    for layer, scores_NE in enumerate(trace.scores().values()):
        scores = scores_NE[:: math.ceil(scores_NE.numel() / SAMPLE)].flatten()
        bins = ((torch.logit(scores, eps=1e-7) + SPAN) * (BINS / (2 * SPAN))).long()
        places.append(bins.clamp_(0, BINS - 1) + layer * BINS)
    return torch.bincount(torch.cat(places), minlength=len(places) * BINS).view(-1, BINS)


def quantiles(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the logit of each layer that the share of its logits which is to be sparse does not exceed, [L].

    The share follows ``sparsity_per_layer``: it is that of every layer (``equal``), of all layers together, so that one
    logit is that of all (``free``), or each layer's own.

    Args:
        model: A converted model.
        counts_LH: Its logits, as of `histogram`.
        sparsity: The sparsity wanted of the model.
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
    return (bins_L + 1) * (2 * SPAN / BINS) - SPAN  # the bin's upper edge: what lies in it does not run


def gaps(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns how far the logits' quantiles lie below the threshold, [L]; arguments as of `quantiles`."""
    tau = next(iter(expert_ffns(model).values())).trained_threshold
    return torch.logit(torch.tensor(tau, dtype=torch.float64)).item() - quantiles(model, counts_LH, sparsity)


def distances(model: nn.Module, counts_LH: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns the gaps that one step answers to, [L], limited to `LIMIT` either way; arguments as of `quantiles`."""
    return gaps(model, counts_LH, sparsity).clamp(-LIMIT, LIMIT)


def follow(model: nn.Module, distances_L: torch.Tensor, rate: float) -> None:
    """Moves every layer's logits by a share of their distance."""
    for selector, distance in zip(selectors(model), distances_L, strict=True):
        selector.raise_logits(rate * distance)


@torch.no_grad()
def rest(
    model: nn.Module,
    batches: Sequence[Batch],
    sparsity: float,
    reduce: Reduce = lambda counts: counts,
    rounds: int = ROUNDS,
) -> torch.Tensor:
    """Moves the logits until a model has a sparsity on given rows, in the mode that it is in.

    A layer's logits depend on what layers before it leave out, so they are read again.

    Args:
        model: A converted model with controlled routers, in eval mode, ``soft`` or ``hard``.
        batches: The rows, on this device.
        sparsity: The sparsity wanted.
        reduce: Sums counts over devices.
        rounds: How often the rows are run, at most.

    Returns:
        By how much each layer's logits were moved, [L].
    """
    moved_L = torch.zeros(len(selectors(model)))
    for _ in range(rounds):
        counts_LH: torch.Tensor | None = None
        for run, token_masks_BT in batches:
            with RouterTrace(model, *token_masks_BT) as trace:
                run()
            here = histogram(model, trace)
            counts_LH = here if counts_LH is None else counts_LH + here
        assert counts_LH is not None  # a data module has rows
        gaps_L = gaps(model, reduce(counts_LH), sparsity)
        follow(model, gaps_L, 1.0)
        moved_L += gaps_L.float().cpu()
        if bool((gaps_L.abs() < 4 * SPAN / BINS).all()):
            break
    return moved_L

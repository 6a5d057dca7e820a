"""A sparsity knob for a trained model: each layer's threshold for each sparsity, from calibration rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from lte_lightning.bars import Bar
from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import expert_ffns, require_expert_ffns, set_mode
from lte_lightning.core.model.thresholds import Setting, ThresholdTable
from lte_lightning.core.routing.prune import Batch
from lte_lightning.core.routing.sparsity import Counts
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class

Layers = Literal["free", "equal", "least-loss"]
LAYERS: tuple[Layers, ...] = get_args(Layers)
ROUNDS = 8
CLOSE = 0.001  # stop within this distance of the sparsity
SAMPLE = 1 << 22  # scores per layer for a quantile; a layer with more is sampled at evenly spaced tokens
GRID = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)  # sparsities of one layer at which the loss is measured


def require_knob(model: PreTrainedModel) -> None:
    """Refuses a model whose sparsity does not follow from a threshold.

    Raises:
        UserError: If its selector chooses without a threshold, or scales experts.
    """
    name = lte_config(model).selector
    kind = selector_class(name)
    if kind.scales or not kind.graded:
        raise UserError(
            f"selector {name!r} chooses without a threshold on scores, so there is none to calibrate; give it another "
            "target_sparsity in a new fit"
        )


@torch.no_grad()
def find_thresholds(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sparsities: Sequence[float],
    layers: Layers = "free",
    progress: bool = False,
) -> ThresholdTable:
    """Finds thresholds that give a model these sparsities on calibration rows.

    Thresholds are quantiles of scores. A layer's scores depend on the sparsity of earlier layers, so they are read
    again with the new thresholds, at most `ROUNDS` times. The closest setting is kept.

    Args:
        model: A converted model in eval mode. Afterwards it is in mode ``hard``, with its old thresholds.
        batches: Calibration rows. For ``least-loss`` each must return outputs with a ``loss``.
        sparsities: Shares of the FFN neurons to skip, each above 0 and below 1.
        layers: ``free`` uses one threshold for all layers, as in training: a layer with low scores skips more.
            ``equal`` gives every layer the same sparsity. ``least-loss`` divides the budget by the loss that each
            layer's sparsity costs (see `layer_losses` and `share_out`).
        progress: Show a progress bar.

    Raises:
        UserError: If the model's selector has no threshold, or a sparsity cannot be reached.
    """
    require_knob(model)
    wanted = sorted(set(sparsities))
    if not wanted or not all(0.0 < sparsity < 1.0 for sparsity in wanted):
        raise UserError(f"sparsities are {list(sparsities)}; each must be above 0 and below 1")
    if layers not in LAYERS:
        raise UserError(f"layers is {layers!r}; it must be one of {', '.join(LAYERS)}")
    ffns = list(require_expert_ffns(model).values())
    before = [ffn.threshold for ffn in ffns]
    set_mode(model, "hard")
    try:
        for ffn in ffns:
            ffn.threshold = ffn.trained_threshold
        shares = [[sparsity] * len(ffns) for sparsity in wanted]
        if layers == "least-loss":
            losses_LG, pairs = layer_losses(model, batches, progress)
            shares = [share_out(losses_LG, pairs, sparsity) for sparsity in wanted]
        settings, tokens = [], 0
        for sparsity, share_L in Bar([*zip(wanted, shares, strict=True)], desc="thresholds", disable=not progress):
            setting, tokens = _setting(model, batches, sparsity, None if layers == "free" else share_L)
            settings.append(setting)
    finally:
        for ffn, threshold in zip(ffns, before, strict=True):
            ffn.threshold = threshold
    return ThresholdTable(tuple(settings), layers, tokens)


def _setting(
    model: PreTrainedModel, batches: Sequence[Batch], sparsity: float, share_L: Sequence[float] | None
) -> tuple[Setting, int]:
    ffns = list(expert_ffns(model).values())
    best: Setting | None = None
    scores, counts = _scores(model, batches)
    for _ in range(ROUNDS):
        if share_L is None:
            levels = [_level(torch.cat(scores), sparsity)] * len(ffns)
        else:
            levels = [_level(each, share) for each, share in zip(scores, share_L, strict=True)]
        for ffn, level in zip(ffns, levels, strict=True):
            ffn.threshold = level
        scores, counts = _scores(model, batches)
        reached = counts.sparsity()
        if best is None or abs(reached - sparsity) < abs(best.reached - sparsity):
            thresholds = tuple(ffn.threshold for ffn in ffns)
            best = Setting(sparsity, reached, thresholds, tuple(counts.per_layer()))
        if abs(reached - sparsity) < CLOSE:
            break
    assert best is not None  # at least one round ran
    return best, int(counts.tokens_L.max())


def _scores(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], Counts]:
    """Returns the scores of each layer on the CPU (a sample if there are many), and the counts of experts that ran."""
    seen: list[list[torch.Tensor]] = [[] for _ in require_expert_ffns(model)]
    counts: Counts | None = None
    for run, token_masks_BT in batches:
        with RouterTrace(model, *token_masks_BT) as trace:
            run()
        counts = trace.counts() if counts is None else counts + trace.counts()
        for kept, scores_NE in zip(seen, trace.scores().values(), strict=True):
            kept.append(scores_NE.cpu())
    if counts is None:
        raise UserError("there are no rows to calibrate on")
    step = max(1, max(counts.pairs) // SAMPLE)
    return [torch.cat(kept)[::step].flatten() for kept in seen], counts


def _level(scores: torch.Tensor, share: float) -> float:
    """Returns the quantile of the scores at this share; 0 for a share of none."""
    cut = round(share * len(scores))
    return float(scores.kthvalue(cut).values) if cut else 0.0


def layer_losses(
    model: PreTrainedModel, batches: Sequence[Batch], progress: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Returns the loss with one layer at a sparsity of `GRID` and the other layers unchanged.

    Args:
        model: In mode ``hard``.
        batches: Each must return outputs with a ``loss``.
        progress: Show a progress bar.

    Returns:
        The losses [L, G], averaged over tokens, and the number of (token, expert) pairs of each layer.

    Raises:
        UserError: If the outputs have no loss.
    """
    ffns = list(require_expert_ffns(model).values())
    scores, counts = _scores(model, batches)
    losses = []
    for ffn, own in Bar([*zip(ffns, scores, strict=True)], desc="loss by layer", disable=not progress):
        before = ffn.threshold
        for sparsity in GRID:
            ffn.threshold = _level(own, sparsity)
            losses.append(_loss(batches))
        ffn.threshold = before
    return torch.tensor(losses, dtype=torch.float64).view(len(ffns), -1), counts.pairs


def _loss(batches: Sequence[Batch]) -> float:
    total = tokens = 0.0
    for run, token_masks_BT in batches:
        outputs: Any = run()
        loss = getattr(outputs, "loss", None)
        if loss is None:
            raise UserError("least-loss needs a loss, but these rows have no labels; use free or equal")
        weight = float(token_masks_BT[-1].sum())
        total, tokens = total + float(loss) * weight, tokens + weight
    return total / tokens


def share_out(losses_LG: torch.Tensor, pairs: Sequence[int], sparsity: float) -> list[float]:
    """Returns the layers' sparsities with the least sum of losses under a budget.

    The losses of single layers are assumed to add up and to be convex: each layer is replaced by its lower convex hull
    over `GRID`, which also removes noise. The budget then buys the cheapest segments first, as in TEAL's greedy
    allocation (James Liu and others, "Training-Free Activation Sparsity in Large Language Models", 2024, arXiv
    2408.14690). TEAL allocates by the error of a block's output; this function allocates by the loss.

    Args:
        losses_LG: The losses of `layer_losses`.
        pairs: The weight of each layer in the model's sparsity.
        sparsity: The budget.

    Raises:
        UserError: If the budget exceeds the last sparsity of the grid.
    """
    if sparsity > GRID[-1]:
        raise UserError(f"least-loss reaches sparsities up to {GRID[-1]}, not {sparsity}; use free or equal")
    segments = []  # slope in loss per pair, layer, from, to
    for layer, losses_G in enumerate(losses_LG.tolist()):
        hull = _lower_hull(list(zip(GRID, losses_G, strict=True)))
        segments += [((y1 - y0) / ((x1 - x0) * pairs[layer]), layer, x0, x1) for (x0, y0), (x1, y1) in pairwise(hull)]
    left, share_L = sparsity * sum(pairs), [GRID[0]] * len(pairs)
    for _, layer, start, end in sorted(segments):  # slopes of a convex layer rise, so its segments stay in order
        taken = min((end - start) * pairs[layer], left)
        share_L[layer] = start + taken / pairs[layer]
        left -= taken
        if left <= 0:
            break
    return share_L


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull

"""Calibration of baselines on training rows: levels, fixed choices, TEAL's allocation, Wanda's pruning."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.convert import require_expert_ffns, set_mode
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.routing.observe import enough, rankings, watch
from lte_lightning.core.routing.prune import Batch, prune
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.selection import Ranking, Teal, Wanda

BISECTIONS = 12  # of a level between 0 and 1: closer than one in four thousand


def needs_calibration(model: nn.Module) -> bool:
    """Says whether the model's selectors must be calibrated on training rows."""
    return any(ranking.calibrates for ranking in rankings(model))


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterator[Batch], tokens: int) -> None:
    """Calibrates every ranking that needs it on training rows; of Wanda it prunes the model.

    Levels are set where they will be used: a layer's behind layers that leave out what theirs tell them to, and a level
    common to all layers by what the whole model leaves out. A level from the dense model would miss the sparsity that
    is asked for, since sparse layers hand on other activations. TEAL's are from the dense model all the same, as its
    authors' are, and so is a fixed choice.

    Args:
        model: A converted model, in eval mode; its mode is ``dense`` afterwards.
        batches: For each batch what runs the model on it, and its token masks.
        tokens: How many to calibrate on; batches are run until there are as many.
    """
    first = next((ranking for ranking in rankings(model) if ranking.calibrates), None)
    if first is None:
        return
    kept, ffns = list(enough(batches, tokens)), list(require_expert_ffns(model).values())
    if isinstance(first, Wanda):
        prune(model, kept)
    elif first.rule == "common":
        _bisect(model, first.sparsity, kept)
    elif first.rule == "level" and not isinstance(first, Teal):
        set_mode(model, "dense")
        for ffn in ffns:
            _set(ffn, _importance(model, [ffn], kept)[0][:tokens])
            ffn.mode = "hard"
    else:
        set_mode(model, "dense")
        for ffn, found in zip(ffns, _importance(model, ffns, kept), strict=True):
            _set(ffn, found[:tokens])
    set_mode(model, "dense")


def _importance(model: nn.Module, ffns: Sequence[ExpertFfn], batches: Sequence[Batch]) -> list[torch.Tensor]:
    """How important FFNs that run densely find their experts, [N, E] each; of TEAL the inputs, [N, D]."""
    seen: dict[int, list[torch.Tensor]] = {id(ffn): [] for ffn in ffns}

    def see(ffn: ExpertFfn, x_ND: torch.Tensor, gate_NF: torch.Tensor, hidden_NF: torch.Tensor) -> None:
        given = {"input": x_ND, "gate": gate_NF, "hidden": hidden_NF}[ffn.selector.reads]
        if isinstance(ffn.selector, Teal):
            seen[id(ffn)].append(x_ND.cpu())
        elif isinstance(ffn.selector, Ranking):
            seen[id(ffn)].append(ffn.selector.importance(given).cpu())

    for run, token_masks_BT in batches:
        with watch(ffns, see, *token_masks_BT):
            run()
    return [torch.cat(found) for found in seen.values()]


def _set(ffn: ExpertFfn, found: torch.Tensor) -> None:
    if isinstance(ffn.selector, Teal):
        _allocate(ffn, ffn.selector, found.to(ffn.up.weight.device))
    elif isinstance(ffn.selector, Ranking):
        ffn.selector.calibrate(found)


def _bisect(model: nn.Module, sparsity: float, batches: Sequence[Batch]) -> None:
    """Looks for the one level of all layers, between 0 and 1, at which they are as sparse on average as asked for."""
    low, high = 0.0, 1.0
    set_mode(model, "hard")
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        for ranking in rankings(model):
            ranking.level.fill_(level)
        idle = total = 0
        for run, token_masks_BT in batches:
            with RouterTrace(model, *token_masks_BT) as trace:
                run()
            for scores_NE in trace.scores().values():
                idle += int((scores_NE == 0).sum())
                total += scores_NE.numel()
        low, high = (low, level) if idle > sparsity * total else (level, high)


def _allocate(ffn: ExpertFfn, teal: Teal, x_ND: torch.Tensor) -> None:
    """Runs the FFN on its inputs with the levels that are tried."""
    hiddens: list[torch.Tensor] = []
    ffn.observer = lambda *given: hiddens.append(given[-1])
    dense_ND = ffn(x_ND)
    ffn.observer, ffn.mode = None, "hard"
    teal.allocate(x_ND, hiddens[0], dense_ND, lambda: ffn(x_ND))
    ffn.mode = "dense"

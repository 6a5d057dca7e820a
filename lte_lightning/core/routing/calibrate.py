"""Calibrates selectors on training rows, each in its own way."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import ExpertFfn, Mode, require_expert_ffns, set_mode
from lte_lightning.core.routing.observe import selectors, take_tokens, watch
from lte_lightning.core.routing.prune import Batch, prune
from lte_lightning.core.routing.target_sparsity import Reduce, shift_to_sparsity
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.selection import Activity

BISECTIONS = 12  # of a level between 0 and 1; leaves an error below 1/4000


def needs_calibration(model: nn.Module) -> bool:
    """Whether the model's selectors must be calibrated on training rows."""
    return selectors(model)[0].calibrates() != "none"


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Iterator[Batch], tokens: int, reduce: Reduce = lambda counts: counts
) -> None:
    """Calibrates the selectors on training rows, as their ``calibration`` says; ``none`` changes nothing.

    Levels are set on the activations of the sparse model: each layer's level after layers that are already sparse, and
    a common level by the sparsity of the whole model. Levels from the dense model would miss the target sparsity,
    because sparse layers change the activations of later layers. TEAL's levels and fixed choices come from the dense
    model all the same, as their authors define them.

    Args:
        model: A converted model, in eval mode; its mode is ``dense`` afterwards.
        batches: For each batch, a function that runs the model on it, and its token masks.
        tokens: Number of tokens to calibrate on; batches run until this number is reached.
        reduce: Sums counts over devices. Only selectors that are calibrated by sparsity control use several devices.
    """
    ways: dict[str, Callable[[PreTrainedModel, Sequence[Batch], int], None]] = {
        "dense": _on_dense,
        "sequential": _in_turn,
        "common": _common_level,
        "pruning": lambda model, batches, tokens: prune(model, batches),
        "control": lambda model, batches, tokens: _control(model, batches, reduce),
    }
    way = ways.get(selectors(model)[0].calibrates())
    if way is not None:
        way(model, list(take_tokens(batches, tokens, reduce)), tokens)
        set_mode(model, "dense")


def _on_dense(model: PreTrainedModel, batches: Sequence[Batch], tokens: int) -> None:
    set_mode(model, "dense")
    ffns = list(require_expert_ffns(model).values())
    for ffn, sample in zip(ffns, _samples(ffns, batches), strict=True):
        ffn.selector.calibrate(sample[:tokens].to(ffn.up.weight.device), _Runs(ffn))


def _in_turn(model: PreTrainedModel, batches: Sequence[Batch], tokens: int) -> None:
    set_mode(model, "dense")
    for ffn in require_expert_ffns(model).values():
        (sample,) = _samples([ffn], batches)
        ffn.selector.calibrate(sample[:tokens].to(ffn.up.weight.device), _Runs(ffn))
        ffn.mode = "hard"


def _control(model: PreTrainedModel, batches: Sequence[Batch], reduce: Reduce) -> None:
    set_mode(model, "hard")
    shift_to_sparsity(model, batches, lte_config(model).target_sparsity or 0.0, reduce)


def _common_level(model: PreTrainedModel, batches: Sequence[Batch], tokens: int) -> None:
    """Searches the common level of all layers, between 0 and 1, that gives the model its target sparsity."""
    low, high = 0.0, 1.0
    wanted = lte_config(model).target_sparsity or 0.0
    set_mode(model, "hard")
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        for selector in selectors(model):
            selector.set_common_level(level)
        counts = None
        for run, token_masks_BT in batches:
            with RouterTrace(model, *token_masks_BT) as trace:
                run()
            counts = trace.counts() if counts is None else counts + trace.counts()
        too_sparse = counts is not None and counts.sparsity() > wanted
        low, high = (low, level) if too_sparse else (level, high)


def _samples(ffns: Sequence[ExpertFfn], batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Returns each selector's calibration samples of every token, on the CPU; the FFNs run densely."""
    seen: dict[int, list[torch.Tensor]] = {id(ffn): [] for ffn in ffns}

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        seen[id(ffn)].append(ffn.selector.sample(activity).cpu())

    for run, token_masks_BT in batches:
        with watch(ffns, see, *token_masks_BT):
            run()
    return [torch.cat(samples) for samples in seen.values()]


class _Runs:
    """Runs an FFN for its selector, and leaves its mode unchanged."""

    def __init__(self, ffn: ExpertFfn) -> None:
        self.ffn = ffn

    def dense(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hiddens: list[torch.Tensor] = []
        self.ffn.observer = lambda *given: hiddens.append(given[-1])
        try:
            out_ND = self._run(x_ND, "dense")
        finally:
            self.ffn.observer = None
        return hiddens[0], out_ND

    def hard(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self._run(x_ND, "hard")

    def _run(self, x_ND: torch.Tensor, mode: Mode) -> torch.Tensor:
        before, self.ffn.mode = self.ffn.mode, mode
        try:
            out_ND: torch.Tensor = self.ffn(x_ND)
        finally:
            self.ffn.mode = before
        return out_ND

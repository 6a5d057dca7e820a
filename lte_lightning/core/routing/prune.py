"""Prunes a converted model's weights, for selectors such as Wanda that remove weights for every token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import ExpertFfn, expert_ffns, set_mode
from lte_lightning.core.model.parts import Projection, find_layers, weight_rows
from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class

# a function that runs the model on a batch, and the batch's token masks
Batch = tuple[Callable[[], object], tuple[torch.Tensor, ...]]


@torch.no_grad()
def prune(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Sets the least important weights to 0, in place, as the model's selectors choose (`Selector.least_important`).

    Layers are pruned one after the other, each by its inputs after pruned layers, as Wanda's authors do.

    Args:
        model: A converted model; its mode is ``dense`` afterwards.
        batches: Calibration rows; each batch runs once per layer.

    Raises:
        UserError: If a projection's input does not match the batch's tokens.
    """
    set_mode(model, "dense")
    for ffn, projections in _targets(model):
        with _input_squares(projections, ffn.stack) as (squares, show):
            for run, token_masks_BT in batches:
                show(token_masks_BT)
                run()
        for projection in projections:
            weight_OI = weight_rows(projection)
            weight_OI.masked_fill_(ffn.selector.least_important(weight_OI, squares[projection].sqrt()), 0.0)
        weights = [p.weight for p in (ffn.gate, ffn.up, ffn.down) if p is not None]
        left = sum(int(weight.count_nonzero()) for weight in weights)
        ffn.selector.set_density(left / sum(weight.numel() for weight in weights))


def hold_zeros(model: PreTrainedModel) -> None:
    """Clears the gradient of every weight that is 0, so that pruned weights stay pruned."""
    for _, projections in _targets(model):
        for projection in projections:
            if projection.weight.grad is not None:
                projection.weight.grad.masked_fill_(projection.weight == 0, 0.0)


def weights_left(model: PreTrainedModel) -> dict[Projection, int]:
    """Returns the number of weights that each pruned projection keeps; empty if none is pruned.

    The weights may be on the meta device: every row of a projection keeps the same number.
    """
    left = {}
    for ffn, projections in _targets(model):
        for projection in projections:
            rows, inputs = weight_rows(projection).shape
            left[projection] = rows * ffn.selector.weights_left(inputs)
    return left


def _targets(model: PreTrainedModel) -> Iterator[tuple[ExpertFfn, list[Projection]]]:
    """Yields the pruned projections, layer by layer."""
    if selector_class(lte_config(model).selector).calibration != "pruning":
        return
    for layer in find_layers(model):
        (ffn,) = expert_ffns(layer).values()
        scope = ffn.selector.prune_scope()
        if scope != "none":
            inside: nn.Module = layer if scope == "layers" else ffn
            yield ffn, [module for module in inside.modules() if isinstance(module, Projection)]


@contextmanager
def _input_squares(
    projections: Sequence[Projection], stack: int
) -> Iterator[tuple[dict[Projection, torch.Tensor], Callable[[tuple[torch.Tensor, ...]], None]]]:
    """Sums the squares of the projections' inputs over real tokens, [I] each, and takes the masks of batches."""
    squares = {p: torch.zeros(weight_rows(p).shape[1], device=p.weight.device) for p in projections}
    real_N = torch.empty(0)

    def show(token_masks_BT: tuple[torch.Tensor, ...]) -> None:
        nonlocal real_N
        real_N = token_masks_BT[stack].flatten().bool()

    def add(projection: Projection, given: tuple[Any, ...]) -> None:
        x_NI = given[0].flatten(0, -2)
        if len(x_NI) != len(real_N):
            raise UserError(
                f"pruning cannot tell real tokens from padding: a projection reads {len(x_NI)} rows, but the batch "
                f"has {len(real_N)} tokens; set wanda_scope to ffn"
            )
        squares[projection] += x_NI[real_N].float().square().sum(0)

    hooks = [projection.register_forward_pre_hook(add) for projection in projections]
    try:
        yield squares, show
    finally:
        for hook in hooks:
            hook.remove()

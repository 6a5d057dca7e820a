"""Wanda: pruning a converted model's weights by their size and that of what they are multiplied with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import expert_ffns, lte_config, set_mode
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.parts import Projection, find_layers, weight_rows
from lte_lightning.errors import UserError
from lte_lightning.selection import Wanda

# What runs the model on a batch, and the batch's token masks
Batch = tuple[Callable[[], object], tuple[torch.Tensor, ...]]


@torch.no_grad()
def prune(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Sets the least important weights to 0 (Wanda, Sun et al. 2023), in place, by the model's configuration.

    A weight is as important as its size times the L2 norm of its input over the real tokens, and competes within its
    row (the weights of one output), or with its neighbours in a pattern such as 2:4. As the authors do, layers are
    pruned one after the other, each by the inputs that it has behind the pruned ones. They calibrate on 128 texts of
    2,048 tokens, here it is training rows.

    Args:
        model: Converted with selector ``wanda``; its mode is ``dense`` afterwards.
        batches: What to calibrate on; each runs once for every layer.

    Raises:
        UserError: If a projection is given something else than the batch's tokens.
    """
    config = lte_config(model)
    set_mode(model, "dense")
    for ffn, projections in _targets(model):
        with _input_squares(projections, ffn.stack) as (squares, show):
            for run, token_masks_BT in batches:
                show(token_masks_BT)
                run()
        for projection in projections:
            weight_OI = weight_rows(projection)
            weight_OI.masked_fill_(least_important(weight_OI, squares[projection].sqrt(), config), 0.0)
        if isinstance(ffn.selector, Wanda):
            weights = [p.weight for p in (ffn.gate, ffn.up, ffn.down) if p is not None]
            left = sum(int(weight.count_nonzero()) for weight in weights)
            ffn.selector.density.fill_(left / sum(weight.numel() for weight in weights))


def least_important(weight_OI: torch.Tensor, norms_I: torch.Tensor, config: LteConfig) -> torch.Tensor:
    """Returns True for the weights [out, in] that go, given the norms [in] of the inputs."""
    score_OI = weight_OI.abs().float() * norms_I
    row = int(config.wanda_pattern[-1]) if config.wanda_pattern != "unstructured" else score_OI.shape[1]
    score_OGR = score_OI.unflatten(1, (-1, row))
    gone = score_OGR.topk(row - _left(row, config), largest=False).indices
    return torch.zeros_like(score_OGR, dtype=torch.bool).scatter_(-1, gone, True).flatten(1)


def hold_zeros(model: PreTrainedModel) -> None:
    """Takes the gradient from every weight that is 0, so that what was pruned stays so; nothing if nothing was."""
    for _, projections in _targets(model):
        for projection in projections:
            if projection.weight.grad is not None:
                projection.weight.grad.masked_fill_(projection.weight == 0, 0.0)


def weights_left(model: PreTrainedModel) -> dict[Projection, int]:
    """Returns how many weights each projection keeps that is to be pruned; empty but for Wanda.

    The weights may be on the meta device: every row of a projection keeps the same number.
    """
    config = lte_config(model)
    shapes = {p: weight_rows(p).shape for _, projections in _targets(model) for p in projections}
    return {projection: rows * _left(row, config) for projection, (rows, row) in shapes.items()}


def _left(row: int, config: LteConfig) -> int:
    return row - round((config.target_sparsity or 0.0) * row)


def _targets(model: PreTrainedModel) -> Iterator[tuple[ExpertFfn, list[Projection]]]:
    """The projections that are pruned, layer after layer."""
    config = lte_config(model)
    for layer in find_layers(model) if config.selector == "wanda" else ():
        (ffn,) = expert_ffns(layer).values()
        inside: nn.Module = layer if config.wanda_scope == "layers" else ffn
        yield ffn, [module for module in inside.modules() if isinstance(module, Projection)]


@contextmanager
def _input_squares(
    projections: Sequence[Projection], stack: int
) -> Iterator[tuple[dict[Projection, torch.Tensor], Callable[[tuple[torch.Tensor, ...]], None]]]:
    """Sums the squares of the projections' inputs over real tokens, [I] each, and takes each batch's masks."""
    squares = {p: torch.zeros(weight_rows(p).shape[1], device=p.weight.device) for p in projections}
    real_N = torch.empty(0)

    def show(token_masks_BT: tuple[torch.Tensor, ...]) -> None:
        nonlocal real_N
        real_N = token_masks_BT[stack].flatten().bool()

    def add(projection: Projection, given: tuple[Any, ...]) -> None:
        x_NI = given[0].flatten(0, -2)
        if len(x_NI) != len(real_N):
            raise UserError(
                f"wanda cannot tell real tokens from padding: a projection is given {len(x_NI)} rows, and the batch "
                f"has {len(real_N)} tokens; set wanda_scope to ffn"
            )
        squares[projection] += x_NI[real_N].float().square().sum(0)

    hooks = [projection.register_forward_pre_hook(add) for projection in projections]
    try:
        yield squares, show
    finally:
        for hook in hooks:
            hook.remove()

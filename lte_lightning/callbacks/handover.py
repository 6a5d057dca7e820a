"""What a switch of stages changes besides the model: DDP's wrapper, and what the next optimizer knows of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import weight_rows
from lte_lightning.core.model.sharding import whole, write


def rewrap(trainer: Trainer) -> None:
    """Has DDP look for trainable parameters anew: those thawed after it wrapped would never be reduced."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.strategy._setup_model(trainer.lightning_module)


def hand_over(
    known: Mapping[torch.Tensor, dict[str, Any]], optimizer: Optimizer, model: nn.Module, orders: Sequence[torch.Tensor]
) -> None:
    """Gives an optimizer the state that another one has of the same parameters.

    Args:
        known: The state of the other one. Parameters that the optimizer does not train are left out.
        optimizer: A fresh one, of the same class.
        model: The converted model.
        orders: The order that the neurons of each FFN have been put in since, [F]; empty if they kept theirs.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in trained & known.keys():
        optimizer.state[parameter] = dict(known[parameter])
    for ffn, order_F in zip(expert_ffns(model).values(), orders, strict=False):
        for projection, dim in ((ffn.up, 0), (ffn.gate, 0), (ffn.down, 1)):
            if projection is None:
                continue
            transposed = weight_rows(projection) is not projection.weight
            _reorder(optimizer.state.get(projection.weight), projection.weight, order_F, 1 - dim if transposed else dim)
            if dim == 0 and projection.bias is not None:
                _reorder(optimizer.state.get(projection.bias), projection.bias, order_F, 0)


def _reorder(state: dict[str, Any] | None, parameter: torch.Tensor, order_F: torch.Tensor, dim: int) -> None:
    for value in (state or {}).values():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            write(value, whole(value).index_select(dim, order_F.to(value.device)))

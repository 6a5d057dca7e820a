"""Shard a model's weights over devices (FSDP2) by layer, and read and write them whole."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.exact import is_part, is_sharded
from lte_lightning.core.model.parts import find_layers


def shard(model: PreTrainedModel, mesh: Any) -> None:
    """Shards the weights of a converted model over the devices of a mesh, in place: each layer, then the rest.

    Args:
        model: The model, whole and the same in every process.
        mesh: A torch ``DeviceMesh`` of one dimension.
    """
    from torch.distributed.fsdp import fully_shard  # torch without distributed has none

    for layer in find_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Frees gathered weights. After a forward pass the weights outside the layers are still whole.

    Until this call, a model's parameters are not those that its optimizer knows.
    """
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Any) -> torch.Tensor:
    """Returns the whole of a tensor that may be a part. Every process must call this."""
    full: torch.Tensor = tensor.full_tensor() if is_part(tensor) else tensor
    return full


def part_like(value: torch.Tensor, like: Any) -> Any:
    """Returns this process's part of a whole tensor, sharded like another tensor. Every process has the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def write(tensor: Any, value: torch.Tensor) -> None:
    """Writes a whole value into a tensor that may be a part. Every process has the value."""
    if is_part(tensor):
        tensor.to_local().copy_(part_like(value, tensor).to_local())
    else:
        tensor.copy_(value)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's state dict with whole tensors, on the CPU. Every process must call this."""
    return {name: whole(value).cpu() for name, value in model.state_dict().items()}

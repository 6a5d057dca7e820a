"""Take apart a fused projection, which holds the gate's rows and then the up projection's rows.

While an FFN has experts, its fused projection is empty. Its halves are two projections that share the memory of the
fused weight. While the model is plain, the fused projection has its weight back.
"""

import torch
from torch import nn

from lte_lightning.core.model.exact import is_part

_NAMES = ("weight", "bias")


def halves(fused: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Returns gate and up as two projections, whose weights are views of the fused weight."""
    first, second = (
        nn.Linear(fused.in_features, fused.out_features // 2, fused.bias is not None, device="meta").train(
            fused.training
        )
        for _ in range(2)
    )
    for name in _NAMES:
        whole = getattr(fused, name)
        if whole is not None:
            for half, data in zip((first, second), split(whole), strict=True):
                setattr(half, name, nn.Parameter(data, whole.requires_grad))
    return first, second


def take_apart(fused: nn.Linear, first: nn.Module | None, second: nn.Module) -> None:
    """Hands the weights of ``fused`` to its halves. Their parameters stay the same objects."""
    for name in _NAMES:
        whole = getattr(fused, name)
        if whole is not None:
            if not is_part(getattr(second, name)):
                getattr(first, name).data, getattr(second, name).data = split(whole)
            setattr(fused, name, None)


def put_together(fused: nn.Linear, first: nn.Module | None, second: nn.Module) -> None:
    """Gives ``fused`` its weights back, without a copy if the halves still lie side by side in memory.

    The halves lie apart after the model has moved to another device or type. Of sharded halves, ``fused`` gets the
    shape alone: only all processes together could join them, and code that saves gathered weights needs no more.
    """
    fused.training = second.training
    for name in _NAMES:
        part, other = getattr(first, name), getattr(second, name)
        if part is not None:
            data = (
                part.new_empty(2 * len(part), *part.shape[1:], device="meta")
                if is_part(part)
                else join(part.data, other.data)
            )
            setattr(fused, name, nn.Parameter(data, part.requires_grad or other.requires_grad))


def split(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the halves of a fused projection's weight or bias, the gate's first, in its memory."""
    # Each half comes from its own .data. Views of one tensor would share a version counter, and a step on one half
    # would invalidate the tensors that the other half has saved for its backward pass.
    neurons = len(whole) // 2
    return whole.data[:neurons], whole.data[neurons:]


def join(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Joins two halves, without a copy if they lie side by side in memory."""
    one, other = one.detach(), other.detach()
    side_by_side = (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
        and one.is_contiguous()
        and other.is_contiguous()
        and other.storage_offset() == one.storage_offset() + one.numel()
    )
    if side_by_side:
        return one.as_strided((2 * len(one), *one.shape[1:]), one.stride(), one.storage_offset())
    return torch.cat([one, other])

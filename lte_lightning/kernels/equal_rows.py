"""Make each row of a batch bitwise equal to the same row alone, for users who need equal bits more than speed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lte_lightning.kernels.cpu import ffn, quantized  # they define the operators  # noqa: F401

aten, ours = torch.ops.aten, torch.ops.lte_lightning


class equal_rows(TorchDispatchMode):
    """Keeps a sequence's bits independent of the others in its batch: ``with equal_rows(): model(**batch)``.

    torch and this package's kernels choose an algorithm by the number of tokens, and the algorithm sets the order of a
    sum. In this context, matrix products and expert FFNs run one token at a time, and attention one sequence at a time.
    Each costs a call. The bits are equal on a CPU, for sequences that are padded to the same length, and for the
    backends ``cpu`` and ``dense-mask``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        split = _SPLIT.get(func)
        return func(*args, **(kwargs or {})) if split is None else split(func, *args, **(kwargs or {}))


def _mm(func: Any, a_NK: torch.Tensor, b_KM: torch.Tensor) -> torch.Tensor:
    return torch.cat([func(row, b_KM) for row in a_NK.split(1)]) if len(a_NK) > 1 else func(a_NK, b_KM)


def _addmm(func: Any, bias: torch.Tensor, a_NK: torch.Tensor, b_KM: torch.Tensor, **how: Any) -> torch.Tensor:
    if len(a_NK) < 2:
        return func(bias, a_NK, b_KM, **how)
    biases = bias.split(1) if bias.ndim == 2 and len(bias) == len(a_NK) else [bias] * len(a_NK)
    return torch.cat([func(own, row, b_KM, **how) for own, row in zip(biases, a_NK.split(1), strict=True)])


def _bmm(func: Any, a_BNK: torch.Tensor, b_BKM: torch.Tensor) -> torch.Tensor:
    # A sequence alone may be a view with other strides, and torch multiplies such a view in another way.
    pairs = zip(a_BNK.contiguous(), b_BKM.contiguous(), strict=True)
    return torch.stack([_mm(aten.mm.default, a_NK, b_KM) for a_NK, b_KM in pairs])


def _attention(func: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **how: Any) -> Any:
    query, key, value = (each.contiguous() for each in (query, key, value))
    mask = how.pop("attn_mask", None)
    rows = []
    for i in range(len(query)):
        own = {} if mask is None else {"attn_mask": mask[i : i + 1] if mask.ndim == 4 and len(mask) > 1 else mask}
        rows.append(func(query[i : i + 1], key[i : i + 1], value[i : i + 1], *more, **own, **how))
    return tuple(torch.cat(each) for each in zip(*rows, strict=True))


def _experts(func: Any, x_ND: torch.Tensor, mask_NE: torch.Tensor, *weights: Any) -> torch.Tensor:
    pairs = zip(x_ND.split(1), mask_NE.split(1), strict=True)
    return torch.cat([func(x, mask, *weights) for x, mask in pairs]) if len(x_ND) > 1 else func(x_ND, mask_NE, *weights)


def _linear(func: Any, x: torch.Tensor, *weights: Any) -> torch.Tensor:
    rows = x.flatten(0, -2).split(1)
    return torch.cat([func(row, *weights) for row in rows]).unflatten(0, x.shape[:-1])


_SPLIT: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    ours.cpu_ffn.default: _experts,
    ours.quantized_ffn.default: _experts,
    ours.quantized_linear.default: _linear,
}

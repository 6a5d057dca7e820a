"""LayerNorm of a sum on the CPU (norm.h), as the torch operator ``lte_lightning::sum_norm``."""

import ctypes

import torch
from torch.nn import functional

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import DTYPES


def run_sum_norm(
    x_BTD: torch.Tensor, residual_BTD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Computes the LayerNorm of ``x + residual`` with float32 sums and no gradient.

    The sum is rounded to its type before the norm, as torch rounds it. A row of the output depends neither on other
    rows nor on the threads.

    Args:
        x_BTD: Float32, bfloat16 or float16.
        residual_BTD: Of the same shape and type.
        weight_D: The norm's weight, of the same type.
        bias_D: The norm's bias, of the same type.
        epsilon: The norm's epsilon.

    Returns:
        The output [B, T, D], in the type of the input.
    """
    return torch.ops.lte_lightning.sum_norm(x_BTD, residual_BTD, weight_D, bias_D, epsilon)


torch.library.define(
    "lte_lightning::sum_norm", "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float epsilon) -> Tensor"
)


@torch.library.impl("lte_lightning::sum_norm", "CPU")
def _sum_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    given = [x, residual, weight, *([] if bias is None else [bias])]
    if x.dtype not in DTYPES or {each.dtype for each in given} != {x.dtype}:
        raise ValueError(f"the types are {[each.dtype for each in given]}; they must be one type of {[*DTYPES]}")
    D = x.shape[-1]
    if residual.shape != x.shape or any(each.shape != (D,) for each in given[2:]):
        raise ValueError(f"the shapes are {[[*each.shape] for each in given]}, which do not fit")
    lib = library()
    if lib is None:
        return functional.layer_norm(x + residual, (D,), weight, bias, epsilon)
    given = [each.contiguous() for each in given]
    y = torch.empty_like(given[0])
    pointers = [each.data_ptr() for each in given] + [None] * (4 - len(given)) + [y.data_ptr()]
    if lib.lte_sum_norm(
        DTYPES[x.dtype],
        (ctypes.c_int64 * 2)(x.numel() // D if D else 0, D),
        ctypes.c_float(epsilon),
        torch.get_num_threads(),
        (ctypes.c_void_p * 5)(*pointers),
    ):
        raise MemoryError("the cpu kernel found no memory for its buffers")
    return y


@torch.library.register_fake("lte_lightning::sum_norm")
def _fake(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)

"""Attention of an encoder on the CPU (attention.h), as the torch operator ``lte_lightning::attention``."""

import ctypes

import torch
from torch.nn import functional

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import DTYPES


def run_attention(
    q_BHQD: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Computes softmax(q k' scale) v of every head, with float32 scores and sums and no gradient.

    In bfloat16 the probabilities are rounded before they multiply the values, as torch's kernel does. A query that sees
    no key gets zeros. A row of the output depends neither on other rows nor on the threads.

    Args:
        q_BHQD: Queries, float32, bfloat16 or float16.
        k_BHKD: Keys, of the same type.
        v_BHKD: Values, of the same type and width.
        mask: True where a query sees a key, [B or 1, 1, Q or 1, K or 1]; None if it sees all.
        scale: Factor of the scores.

    Returns:
        The output as [B, Q, H, D], in the type of the input.
    """
    return torch.ops.lte_lightning.attention(q_BHQD, k_BHKD, v_BHKD, mask, scale)


torch.library.define("lte_lightning::attention", "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


@torch.library.impl("lte_lightning::attention", "CPU")
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    (B, H, Q, D), K = q.shape, k.shape[2]
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must share a type of {[*DTYPES]}")
    if k.shape != (B, H, K, D) or v.shape != k.shape:
        raise ValueError(f"q, k and v have shapes {[*q.shape]}, {[*k.shape]} and {[*v.shape]}, which do not fit")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        raise ValueError(f"the mask is {mask.dtype} {[*mask.shape]}, and must be boolean [B, 1, Q, K]")
    lib = library()
    if lib is None:
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(B, Q, H, D)
    strides = [step for x in (q, k, v) for step in x.stride()[:3]]
    if mask is not None:
        mask = mask.expand(B, 1, Q, K)
        strides += (mask.stride(0), mask.stride(3), mask.stride(2))
    pointers = [None if x is None else x.data_ptr() for x in (q, k, v, mask, out)]
    status = lib.lte_attention(
        DTYPES[q.dtype],
        (ctypes.c_int64 * 17)(B, H, Q, K, D, *strides),  # the rest is 0
        ctypes.c_float(scale),
        torch.get_num_threads(),
        (ctypes.c_void_p * 5)(*pointers),
    )
    if status:
        raise MemoryError("the cpu kernel found no memory for its buffers")
    return out


@torch.library.register_fake("lte_lightning::attention")
def _fake(q, k, v, mask, scale):  # type: ignore[no-untyped-def]
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D)

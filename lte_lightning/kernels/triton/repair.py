"""Keep NaN and infinity in experts that no token of a block selected out of a dense down projection's output.

The library's product multiplies all rows of the down projection, and zero times NaN is NaN. A search in the weights is
expensive, and a search in the output is cheap. The device checks the output and computes only the spoilt blocks again,
so that the host neither waits nor decides.
"""

import torch
import triton
import triton.language as tl

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import add_bias, dot

AGAIN = {
    2: {"BLOCK_F": 32, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
    4: {"BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
}
"""The down projection's, by bytes per weight, where the dense one was not finite."""
PART = 512
"""Numbers of a row that one program looks at."""


@triton.jit(do_not_specialize=["N"])
def spoilt_kernel(
    y_ptr, spoilt_ptr, N, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Writes 1 for each part of D in which a block of tokens has a nonfinite number, else 0."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    bad = tl.zeros([16, BLOCK_D], tl.int32)
    for n0 in range(0, BLOCK_M, 16):
        n = tl.program_id(1).to(tl.int64) * BLOCK_M + n0 + tl.arange(0, 16)
        y = tl.load(y_ptr + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        bad |= (y.to(tl.float32) * 0.0 != 0.0).to(tl.int32)
    tl.store(spoilt_ptr + tl.program_id(1) * PARTS + tl.program_id(0), tl.max(tl.max(bad, 1), 0))


@triton.jit(do_not_specialize=["N"])
def again_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    active_ptr,
    count_ptr,
    spoilt_ptr,
    y_ptr,
    N,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes BLOCK_D outputs of a spoilt block of tokens, over the experts that the block needs."""
    block = tl.program_id(1)
    part = tl.arange(0, PARTS)
    spoilt = tl.max(tl.load(spoilt_ptr + block * PARTS + part), 0) != 0
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.where(spoilt, tl.load(count_ptr + block) * S, 0)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, end, BLOCK_F):
        place = first + tl.arange(0, BLOCK_F)
        f_ok = place < end
        e = tl.load(active_ptr + block * E + place // S, mask=f_ok, other=0).to(tl.int64)
        f = e * S + place % S
        valid = (n < N)[:, None] & f_ok[None, :]
        hidden = tl.load(hidden_ptr + n[:, None] * (E * S) + f[None, :], mask=valid, other=0.0)
        inside = f_ok[:, None] & (d < D)[None, :]
        y = dot(hidden, tl.load(down_ptr + f[:, None] * D + d[None, :], mask=inside, other=0.0), y)
    y = add_bias(y, bias_ptr, d[None, :], (d < D)[None, :])
    out = y_ptr + n[:, None] * D + d[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :] & spoilt)


def repair(
    y_ND: torch.Tensor,
    hidden_NF: torch.Tensor,
    weights: ExpertWeights,
    active_ME: torch.Tensor,
    count_M: torch.Tensor,
    block: int,
) -> None:
    """Computes the down projection of spoilt blocks of tokens again, in place, over the experts that they need.

    Args:
        y_ND: The dense product's output, contiguous.
        hidden_NF: Masked activations.
        weights: The FFN.
        active_ME: The experts that each block of tokens needs, see `list_active`.
        count_M: The number of these experts.
        block: Tokens per block.
    """
    N, D = y_ND.shape
    E, S, _ = weights.up_ESD.shape
    M, parts = len(count_M), triton.next_power_of_2(triton.cdiv(D, PART))
    shape = {"D": D, "PARTS": parts, "BLOCK_M": block}
    spoilt_MP = torch.empty((M, parts), dtype=torch.int32, device=y_ND.device)
    spoilt_kernel[(parts, M)](y_ND, spoilt_MP, N, BLOCK_D=PART, **shape)
    tile = AGAIN[y_ND.element_size()]
    again_kernel[(triton.cdiv(D, tile["BLOCK_D"]), M)](
        hidden_NF, weights.down_ESD, weights.down_bias_D, active_ME, count_M, spoilt_MP, y_ND, N,
        E=E, S=S, **shape, **tile,
    )  # fmt: skip

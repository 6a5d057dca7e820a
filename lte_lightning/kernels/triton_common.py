"""What the Triton kernels share: the activation, the list of active experts, and the tables of configurations."""

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""

# Interpreted tl.dot on bfloat16 multiplies bit patterns, without a word.
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of `layout.ACTIVATIONS`, in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b``, products and sums in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_bias(acc, bias_ptr, offsets, mask):
    """Adds a bias to ``acc``, if there is one; both have the shape of ``offsets``, or broadcast with it."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["N"])
def compact_kernel(
    mask_ptr,
    active_ptr,
    count_ptr,
    N,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Lists, in order, the experts that any of a block of TOKENS tokens runs; one program per block."""
    block = tl.program_id(0)
    count = 0
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        chosen = tl.zeros([BLOCK_E], tl.int32)
        for n0 in range(0, TOKENS, BLOCK_N):
            n = block.to(tl.int64) * TOKENS + n0 + tl.arange(0, BLOCK_N)
            inside = (n[:, None] < N) & (e[None, :] < E)
            tile = tl.load(mask_ptr + n[:, None] * E + e[None, :], mask=inside, other=0)
            chosen = tl.maximum(chosen, tl.max(tile.to(tl.int32), 0))
        place = count + tl.cumsum(chosen, 0) - 1
        tl.store(active_ptr + block * E + place, e, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + block, count)


def list_active(mask_NE: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the experts that each block of ``tokens`` tokens needs, without the host knowing how many these are.

    Args:
        mask_NE: Contiguous bytes, 0 or 1.
        tokens: Tokens per block.

    Returns:
        ``active_ME``, int32, of which the first ``count_M[m]`` of row m are written; ``count_M``, int32.
    """
    N, E = mask_NE.shape
    M = triton.cdiv(N, tokens)
    active_ME = torch.empty((M, E), dtype=torch.int32, device=mask_NE.device)
    count_M = torch.empty((M,), dtype=torch.int32, device=mask_NE.device)
    blocks = {"BLOCK_N": min(tokens, 8), "BLOCK_E": min(1024, triton.next_power_of_2(E))}
    compact_kernel[(M,)](mask_NE, active_ME, count_M, N, E=E, TOKENS=tokens, num_warps=4, **blocks)
    return active_ME, count_M

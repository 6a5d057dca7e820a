"""Make lists from the mask on the device: the experts that tokens need, and the tokens that experts have."""

import torch
import triton
import triton.language as tl

from lte_lightning.kernels.triton.common import dependent, signal_next, wait_for_last


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
    PDL: tl.constexpr,
):
    """Lists, in order, the experts that any token of a block of TOKENS tokens runs. There is one program per block."""
    block = tl.program_id(0)
    count = 0
    wait_for_last(PDL)
    signal_next(PDL)
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
    """Lists the experts that each block of ``tokens`` tokens needs. The host does not learn their number.

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
    blocks = {"BLOCK_N": min(tokens, 32), "BLOCK_E": min(512, triton.next_power_of_2(E))}
    compact_kernel[(M,)](mask_NE, active_ME, count_M, N, E=E, TOKENS=tokens, num_warps=8, **blocks, **dependent())
    return active_ME, count_M


@triton.jit(do_not_specialize=["N"])
def group_kernel(mask_ptr, tokens_ptr, count_ptr, N, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Lists, in order, the tokens that chose each of BLOCK_E experts."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n[:, None] < N) & (e[None, :] < E)
        chosen = tl.load(mask_ptr + n[:, None].to(tl.int64) * E + e[None, :], mask=inside, other=0).to(tl.int32)
        place = count[None, :] + tl.cumsum(chosen, 0) - 1
        values = tl.broadcast_to(n[:, None], [BLOCK_N, BLOCK_E])
        tl.store(tokens_ptr + e[None, :].to(tl.int64) * N + place, values, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + e, count, mask=e < E)


@triton.jit(do_not_specialize=["M"])
def choose_kernel(
    tokens_count_ptr,
    active_count_ptr,
    grouped_ptr,
    M,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes 1 if the grouped form is cheaper, else 0."""
    grouped = tl.zeros([BLOCK], tl.int64)
    for e0 in range(0, E, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        grouped += tl.cdiv(tl.load(tokens_count_ptr + e, mask=e < E, other=0), BLOCK_M)
    union = tl.zeros([BLOCK], tl.int64)
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        union += tl.load(active_count_ptr + m, mask=m < M, other=0)
    tl.store(grouped_ptr, (tl.sum(grouped, 0) * COST < tl.sum(union, 0) * 16).to(tl.int32))


def list_groups(mask_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the tokens that chose each expert. The host does not learn their number.

    Args:
        mask_NE: Contiguous bytes, 0 or 1.

    Returns:
        ``tokens_EN``, int32, of which the first ``count_E[e]`` of row e are written; ``count_E``, int32.
    """
    N, E = mask_NE.shape
    tokens_EN = torch.empty((E, N), dtype=torch.int32, device=mask_NE.device)
    count_E = torch.empty((E,), dtype=torch.int32, device=mask_NE.device)
    blocks = {"BLOCK_E": 8, "BLOCK_N": 512}
    group_kernel[(triton.cdiv(E, blocks["BLOCK_E"]),)](mask_NE, tokens_EN, count_E, N, E=E, num_warps=4, **blocks)
    return tokens_EN, count_E


def choose_form(count_E: torch.Tensor, count_M: torch.Tensor, tokens: int, cost_16ths: int) -> torch.Tensor:
    """Compares on the device the costs of `prefill`'s two forms.

    Args:
        count_E: Tokens of each expert, int32.
        count_M: Experts of each block of tokens, int32.
        tokens: Tokens per grouped tile.
        cost_16ths: The cost of a grouped tile per neuron, if a union tile costs 16.

    Returns:
        One int32: 1 if the grouped form is cheaper, else 0.
    """
    grouped = torch.empty((1,), dtype=torch.int32, device=count_E.device)
    choose_kernel[(1,)](
        count_E, count_M, grouped, len(count_M), E=len(count_E), BLOCK_M=tokens, COST=cost_16ths, BLOCK=1024
    )
    return grouped

"""A few tokens: each active expert is read once for all tokens.

There are four launches: the list of active experts; their hidden activations; partial sums of the down projection;
their sum. E, D and N set the size of all grids. Only the device knows the number of active experts, and a program past
it ends at once. There are no atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import activate, add_bias, dependent, dot, signal_next, wait_for_last
from lte_lightning.kernels.triton.lists import list_active

MAX_TOKENS = 16
"""More tokens than this go to the prefill kernels."""

# Tiles by bytes per weight, all powers of two. The launch cuts ROWS and BLOCK_S to the expert's size.
HIDDEN = {
    2: {"ROWS": 32, "BLOCK_D": 128, "num_warps": 2, "STAGES": 4},
    4: {"ROWS": 16, "BLOCK_D": 64, "num_warps": 4, "STAGES": 3},
}
DOWN = {
    2: {"BLOCK_S": 32, "BLOCK_D": 256, "num_warps": 4, "STAGES": 4},
    4: {"BLOCK_S": 32, "BLOCK_D": 64, "num_warps": 4, "STAGES": 3},
}
# The target number of programs in the down projection's grid: four for each multiprocessor of a large GPU.
DOWN_PROGRAMS = 512


@triton.jit(do_not_specialize=["N"])
def decode_hidden_kernel(
    x_ptr,
    mask_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    active_ptr,
    count_ptr,
    hidden_ptr,
    N,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes activations [slot, N, S] of ROWS neurons of one active expert, 0 for tokens that did not choose it."""
    CHUNKS: tl.constexpr = (S + ROWS - 1) // ROWS
    slot = tl.program_id(0) // CHUNKS
    wait_for_last(PDL)
    signal_next(PDL)
    if slot >= tl.load(count_ptr):
        return
    e = tl.load(active_ptr + slot).to(tl.int64)
    s = tl.program_id(0) % CHUNKS * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, TOKENS)
    row = (e * S + s) * D
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n[None, :] * D + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0)
        tile = row[:, None] + d[None, :]
        inside = (s[:, None] < S) & (d[None, :] < D)
        up = dot(tl.load(up_ptr + tile, mask=inside, other=0.0), x, up)
        if gate_ptr is not None:
            gate = dot(tl.load(gate_ptr + tile, mask=inside, other=0.0), x, gate)
    up = add_bias(up, up_bias_ptr, e * S + s[:, None], s[:, None] < S)
    if gate_ptr is not None:
        gate = add_bias(gate, gate_bias_ptr, e * S + s[:, None], s[:, None] < S)
        hidden = activate(gate, ACTIVATION) * up
    else:
        hidden = activate(up, ACTIVATION)
    chosen = tl.load(mask_ptr + n * E + e, mask=n < N, other=0) != 0
    hidden = tl.where(chosen[None, :], hidden, 0.0)
    tl.store(hidden_ptr + (slot * N + n[None, :]) * S + s[:, None], hidden, mask=(s[:, None] < S) & (n[None, :] < N))


@triton.jit(do_not_specialize=["N"])
def decode_down_kernel(
    hidden_ptr,
    down_ptr,
    active_ptr,
    count_ptr,
    partial_ptr,
    N,
    S: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes BLOCK_D outputs of the sums [split, N, D] over every SPLITS-th active expert."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    n = tl.arange(0, TOKENS)
    wait_for_last(PDL)
    signal_next(PDL)
    count = tl.load(count_ptr)
    acc = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for slot in tl.range(split, count, SPLITS, num_stages=STAGES):
        e = tl.load(active_ptr + slot).to(tl.int64)
        for s0 in tl.static_range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            inside = (s[:, None] < S) & (d[None, :] < D)
            rows = tl.load(down_ptr + (e * S + s)[:, None] * D + d[None, :], mask=inside, other=0.0)
            valid = (n[:, None] < N) & (s[None, :] < S)
            hidden = tl.load(hidden_ptr + (slot * N + n[:, None]) * S + s[None, :], mask=valid, other=0.0)
            acc = dot(hidden.to(rows.dtype), rows, acc)
    tl.store(partial_ptr + (split * N + n[:, None]) * D + d[None, :], acc, mask=(n[:, None] < N) & (d[None, :] < D))


@triton.jit(do_not_specialize=["N"])
def decode_sum_kernel(
    partial_ptr, bias_ptr, y_ptr, N, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Computes BLOCK numbers of the output: the partial sums in their order, and the bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    wait_for_last(PDL)
    signal_next(PDL)
    for split in tl.static_range(SPLITS):
        y += tl.load(partial_ptr + split * N * D + i, mask=i < N * D, other=0.0)
    y = add_bias(y, bias_ptr, i % D, i < N * D)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < N * D)


def run_decode(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output for at most `MAX_TOKENS` tokens.

    Args:
        x_ND: Contiguous input.
        mask_NE: Contiguous bytes, 0 or 1.
        weights: Contiguous weights of the input's type.

    Returns:
        The output [N, D], accumulated in float32. The hidden activations are rounded to the weights' type before the
        second product, as in the dense FFN.
    """
    N, D = x_ND.shape
    E, S, _ = weights.up_ESD.shape
    pdl = dependent()
    active_ME, count_M = list_active(mask_NE, MAX_TOKENS)

    config = dict(HIDDEN[x_ND.element_size()])
    config["ROWS"] = min(config["ROWS"], max(16, triton.next_power_of_2(S)))
    hidden_ENS = torch.empty((E, N, S), dtype=torch.float32, device=x_ND.device)
    decode_hidden_kernel[(E * triton.cdiv(S, config["ROWS"]),)](
        x_ND,
        mask_NE,
        weights.up_ESD,
        weights.gate_ESD,
        weights.up_bias_ES,
        weights.gate_bias_ES,
        active_ME,
        count_M,
        hidden_ENS,
        N,
        E=E,
        S=S,
        D=D,
        ACTIVATION=weights.activation,
        TOKENS=MAX_TOKENS,
        **config,
        **pdl,
    )

    config = dict(DOWN[x_ND.element_size()])
    config["BLOCK_S"] = min(config["BLOCK_S"], max(16, triton.next_power_of_2(S)))
    tiles = triton.cdiv(D, config["BLOCK_D"])
    splits = min(32, E, triton.cdiv(DOWN_PROGRAMS, tiles))
    partial_KND = torch.empty((splits, N, D), dtype=torch.float32, device=x_ND.device)
    decode_down_kernel[(tiles, splits)](
        hidden_ENS,
        weights.down_ESD,
        active_ME,
        count_M,
        partial_KND,
        N,
        S=S,
        D=D,
        SPLITS=splits,
        TOKENS=MAX_TOKENS,
        **config,
        **pdl,
    )

    y_ND = torch.empty_like(x_ND)
    decode_sum_kernel[(triton.cdiv(N * D, 256),)](
        partial_KND, weights.down_bias_D, y_ND, N, D=D, SPLITS=splits, BLOCK=256, num_warps=2, **pdl
    )
    return y_ND

"""Many tokens: tensor-core products over the tokens that chose an expert, or over the experts that a block needs.

Gate and up have two forms. *Grouped*: for each expert the tokens that chose it are gathered, and nothing else is
computed. *Union*: a block of tokens runs all experts that any of its tokens chose, densely, in tiles as large as a
dense product's. Both are launched; the device compares their costs and the programs of the other end at once, so that
the host neither waits nor decides. The down projection runs by blocks of tokens over the experts that the block needs:
by expert it would have to add D numbers to memory for each S products.
"""

import torch
import triton
import triton.language as tl

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import activate, add_bias, dot
from lte_lightning.kernels.triton.lists import choose_form, list_active, list_groups

# By bytes per weight. BLOCK_M tokens are a block; GROUPED takes BLOCK_F neurons of one expert, UNION of several.
BLOCK_M = {2: 128, 4: 64}
GROUPED = {
    2: {"BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_F": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
}
UNION = {
    2: {"BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_F": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3},
}
DOWN = {
    2: {"BLOCK_F": 64, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
}
"""Tiles: BLOCK_F is the number of neurons, BLOCK_D of the model's dimensions."""


def grouped_cost_16ths(size: int, projections: int) -> int:
    """What a row of a grouped tile costs, one of a union tile being 16: the bytes that the two read per product.

    This is the roofline of a product that the L2 cache feeds, not a measurement; to be measured on a GPU.
    """
    grouped, union = (config[size]["BLOCK_F"] * projections for config in (GROUPED, UNION))
    per_row = [1 / BLOCK_M[size] + 1 / neurons for neurons in (grouped, union)]
    return round(16 * per_row[0] / per_row[1])


@triton.jit
def _hidden_tile(
    x_ptr, n, n_ok, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, f, f_ok, D: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Activations [BLOCK_M, BLOCK_F] of the tokens n and the neurons f; those not ok are any finite number.
    # Gate and up are one tile, a row of each in turn: one product reads x once, and a thread holds both of a neuron.
    if gate_ptr is None:
        rows = up_ptr + f * D
        ok = f_ok
    else:
        turn = tl.arange(0, 2 * BLOCK_F) % 2
        rows = tl.where(turn == 0, gate_ptr, up_ptr) + tl.interleave(f, f) * D
        ok = tl.interleave(f_ok, f_ok)
    acc = tl.zeros([BLOCK_M, rows.shape[0]], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=n_ok[:, None] & (d[None, :] < D), other=0.0)
        weights = tl.load(rows[None, :] + d[:, None], mask=ok[None, :] & (d[:, None] < D), other=0.0)
        acc = dot(x, weights, acc)
    if gate_ptr is None:
        hidden = activate(add_bias(acc, up_bias_ptr, f[None, :], f_ok[None, :]), ACTIVATION)
    else:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_F, 2]))
        up = add_bias(up, up_bias_ptr, f[None, :], f_ok[None, :])
        gate = add_bias(gate, gate_bias_ptr, f[None, :], f_ok[None, :])
        hidden = activate(gate, ACTIVATION) * up
    return hidden


@triton.jit(do_not_specialize=["N"])
def prefill_grouped_kernel(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    tokens_ptr,
    count_ptr,
    grouped_ptr,
    hidden_ptr,
    N,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Hidden activations [N, F] of BLOCK_F neurons of one expert for BLOCK_M of the tokens that chose it."""
    CHUNKS: tl.constexpr = (S + BLOCK_F - 1) // BLOCK_F
    # Blocks of one expert follow each other: they share its weights in the cache.
    blocks = tl.cdiv(N, BLOCK_M)
    chunk = tl.program_id(0) // blocks
    e = chunk // CHUNKS
    place = tl.program_id(0) % blocks * BLOCK_M
    count = tl.load(count_ptr + e)
    if (place >= count) | (tl.load(grouped_ptr) == 0):
        return
    place += tl.arange(0, BLOCK_M)
    n_ok = place < count
    n = tl.load(tokens_ptr + e.to(tl.int64) * N + place, mask=n_ok, other=0).to(tl.int64)
    s = chunk % CHUNKS * BLOCK_F + tl.arange(0, BLOCK_F)
    f = e.to(tl.int64) * S + s
    hidden = _hidden_tile(
        x_ptr, n, n_ok, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, f, s < S, D, ACTIVATION, BLOCK_M, BLOCK_F, BLOCK_D
    )
    out = hidden_ptr + n[:, None] * (E * S) + f[None, :]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=n_ok[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=["N"])
def prefill_union_kernel(
    x_ptr,
    mask_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    active_ptr,
    count_ptr,
    grouped_ptr,
    hidden_ptr,
    N,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Hidden activations [N, F] of a block of tokens for BLOCK_F neurons of the experts that the block needs."""
    block = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_F
    end = tl.load(count_ptr + block) * S
    if (first >= end) | (tl.load(grouped_ptr) != 0):
        return
    n = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = first + tl.arange(0, BLOCK_F)
    f_ok = place < end
    e = tl.load(active_ptr + block * E + place // S, mask=f_ok, other=0).to(tl.int64)
    f = e * S + place % S
    hidden = _hidden_tile(
        x_ptr, n, n < N, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, f, f_ok, D, ACTIVATION, BLOCK_M, BLOCK_F, BLOCK_D
    )
    inside = (n < N)[:, None] & f_ok[None, :]
    chosen = tl.load(mask_ptr + n[:, None] * E + e[None, :], mask=inside, other=0) != 0
    out = hidden_ptr + n[:, None] * (E * S) + f[None, :]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["N"])
def prefill_down_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    active_ptr,
    count_ptr,
    y_ptr,
    N,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D outputs of a block of tokens, over the experts that the block needs."""
    block = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(count_ptr + block) * S
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
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


def run_prefill(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output for any number of tokens.

    Args:
        x_ND: Contiguous input.
        mask_NE: Contiguous bytes, 0 or 1.
        weights: Contiguous weights of the input's type.

    Returns:
        The output [N, D], accumulated in float32; the hidden activations between are of the input's type.
    """
    N, D = x_ND.shape
    E, S, _ = weights.up_ESD.shape
    size = x_ND.element_size()
    active_ME, count_M = list_active(mask_NE, BLOCK_M[size])
    tokens_EN, count_E = list_groups(mask_NE)
    grouped = choose_form(
        count_E, count_M, BLOCK_M[size], grouped_cost_16ths(size, 1 if weights.gate_ESD is None else 2)
    )
    M = len(count_M)

    # Zeros, since a block's union holds experts that some of its tokens did not choose.
    hidden_NF = torch.zeros((N, E * S), dtype=x_ND.dtype, device=x_ND.device)
    projections = (weights.up_ESD, weights.gate_ESD, weights.up_bias_ES, weights.gate_bias_ES)
    shape = {"E": E, "S": S, "D": D, "BLOCK_M": BLOCK_M[size]}
    config = GROUPED[size] | {"BLOCK_F": min(GROUPED[size]["BLOCK_F"], max(16, triton.next_power_of_2(S)))}
    prefill_grouped_kernel[(M * E * triton.cdiv(S, config["BLOCK_F"]),)](
        x_ND, *projections, tokens_EN, count_E, grouped, hidden_NF, N, ACTIVATION=weights.activation, **shape, **config
    )
    prefill_union_kernel[(triton.cdiv(E * S, UNION[size]["BLOCK_F"]), M)](
        x_ND, mask_NE, *projections, active_ME, count_M, grouped, hidden_NF, N,
        ACTIVATION=weights.activation, **shape, **UNION[size],
    )  # fmt: skip

    y_ND = torch.empty_like(x_ND)
    prefill_down_kernel[(triton.cdiv(D, DOWN[size]["BLOCK_D"]), M)](
        hidden_NF, weights.down_ESD, weights.down_bias_D, active_ME, count_M, y_ND, N, **shape, **DOWN[size]
    )
    return y_ND

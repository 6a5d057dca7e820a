"""Many tokens: tensor-core products over the tokens that chose an expert, or over the experts that a block needs.

Gate and up have two forms. The *grouped* form gathers the tokens that chose an expert, and computes nothing else. The
*union* form runs a block of tokens densely through all experts that any of its tokens chose, in tiles as large as a
dense product's. The host launches both, and neither waits nor decides. The device compares their costs, and the
programs of the dearer form end at once. The down projection is the library's dense product over the masked activations,
because by expert it would add D numbers to memory for each S products. Zero times NaN is NaN in that product. So the
device computes a nonfinite output once more, over the experts that its block of tokens needs.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from lte_lightning.kernels.dense_mask import dense_hidden, scale_experts
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import activate, add_bias, dot, has_buffers, is_hopper
from lte_lightning.kernels.triton.lists import choose_form, list_active, list_groups
from lte_lightning.kernels.triton.repair import repair

GROUPED = {"BLOCK_M": 128, "BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
"""A tile of one expert: tokens, neurons, and numbers of the model's width per step."""
UNION = {"BLOCK_M": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
WIDE_UNION = UNION | {"BLOCK_F": 128}
"""A tile of several experts; a wide one where there are the registers for it."""
FEW = {"BLOCK_M": 64, "BLOCK_F": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 4}
"""The union's tile where there is one block of tokens."""
SWIZZLE = 16
"""Blocks of tokens that share a tile of weights while it is in the cache."""
GROUPED_COST_16THS = 23
"""What a grouped tile of one expert costs, a union tile's share of an expert being 16."""


@triton.jit
def _hidden_tile(
    x_ptr, n, n_ok, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, f, f_ok,
    D: tl.constexpr, ACTIVATION: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Computes activations [BLOCK_M, BLOCK_F] of the tokens n and the neurons f; where not ok, any finite number.
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_F if TOGETHER else BLOCK_F], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    rows = up_ptr + f * D
    ok = f_ok
    if TOGETHER:
        # Rows of gate and up alternate, so that one product reads x once, and a thread has both values of a neuron.
        rows = tl.where(tl.arange(0, 2 * BLOCK_F) % 2 == 0, gate_ptr, up_ptr) + tl.interleave(f, f) * D
        ok = tl.interleave(f_ok, f_ok)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=n_ok[:, None] & (d[None, :] < D), other=0.0)
        inside = ok[None, :] & (d[:, None] < D)
        acc = dot(x, tl.load(rows[None, :] + d[:, None], mask=inside, other=0.0), acc)
        if gate_ptr is not None and not TOGETHER:
            gate = dot(x, tl.load((gate_ptr + f * D)[None, :] + d[:, None], mask=inside, other=0.0), gate)
    if TOGETHER:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_F, 2]))
    else:
        up = acc
    up = add_bias(up, up_bias_ptr, f[None, :], f_ok[None, :])
    if gate_ptr is None:
        hidden = activate(up, ACTIVATION)
    else:
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
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes activations [N, F] of BLOCK_F neurons of one expert for BLOCK_M of the tokens that chose it."""
    CHUNKS: tl.constexpr = (S + BLOCK_F - 1) // BLOCK_F
    # Blocks of one expert follow each other, so that they share its weights in the cache.
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
        x_ptr,
        n,
        n_ok,
        up_ptr,
        gate_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        f,
        s < S,
        D,
        ACTIVATION,
        TOGETHER,
        BLOCK_M,
        BLOCK_F,
        BLOCK_D,
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
    TOGETHER: tl.constexpr,
    SWIZZLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes activations [N, F] of a block of tokens for BLOCK_F neurons of the experts that the block needs."""
    # SWIZZLE blocks of tokens take a tile of weights one after the other.
    band: tl.constexpr = SWIZZLE * ((E * S + BLOCK_F - 1) // BLOCK_F)
    first_block = tl.program_id(0) // band * SWIZZLE
    blocks = tl.minimum(tl.cdiv(N, BLOCK_M) - first_block, SWIZZLE)
    block = first_block + tl.program_id(0) % band % blocks
    first = tl.program_id(0) % band // blocks * BLOCK_F
    end = tl.load(count_ptr + block) * S
    if first >= end:
        return
    if grouped_ptr is not None:  # noqa: SIM102 - this is decided when the kernel is compiled
        if tl.load(grouped_ptr) != 0:
            return
    n = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = first + tl.arange(0, BLOCK_F)
    f_ok = place < end
    e = tl.load(active_ptr + block * E + place // S, mask=f_ok, other=0).to(tl.int64)
    f = e * S + place % S
    hidden = _hidden_tile(
        x_ptr,
        n,
        n < N,
        up_ptr,
        gate_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        f,
        f_ok,
        D,
        ACTIVATION,
        TOGETHER,
        BLOCK_M,
        BLOCK_F,
        BLOCK_D,
    )
    inside = (n < N)[:, None] & f_ok[None, :]
    chosen = tl.load(mask_ptr + n[:, None] * E + e[None, :], mask=inside, other=0) != 0
    out = hidden_ptr + n[:, None] * (E * S) + f[None, :]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=chosen)


def run_prefill(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output for any number of tokens.

    Args:
        x_ND: Contiguous input.
        mask_NE: Contiguous bytes, 0 or 1.
        weights: Contiguous weights of the input's type. In float32 gate and up are dense products of the library, too,
            because tensor cores do not multiply float32.

    Returns:
        The output [N, D]. The hidden activations have the input's type.
    """
    # Rows of an odd width load in small pieces, and the addresses of these fill the registers.
    wide = WIDE_UNION if is_hopper() and x_ND.shape[1] % 8 == 0 else UNION
    tile = wide if len(x_ND) > FEW["BLOCK_M"] else FEW
    active_ME, count_M = list_active(mask_NE, tile["BLOCK_M"])
    if x_ND.dtype == torch.float32:
        hidden_NF = scale_experts(dense_hidden(x_ND, weights), mask_NE.view(torch.bool))
    else:
        hidden_NF = _hidden(x_ND, mask_NE, weights, active_ME, count_M, tile)
    y_ND = functional.linear(hidden_NF, weights.down_ESD.flatten(0, 1).T, weights.down_bias_D)
    repair(y_ND, hidden_NF, weights, active_ME, count_M, tile["BLOCK_M"])
    return y_ND


def _hidden(
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    weights: ExpertWeights,
    active_ME: torch.Tensor,
    count_M: torch.Tensor,
    tile: dict[str, int],
) -> torch.Tensor:
    """Computes the masked activations [N, F] by the cheaper form."""
    N, D = x_ND.shape
    E, S, _ = weights.up_ESD.shape
    # Zeros, because a form writes only the activations that it computed.
    hidden_NF = torch.zeros((N, E * S), dtype=x_ND.dtype, device=x_ND.device)
    projections = (weights.up_ESD, weights.gate_ESD, weights.up_bias_ES, weights.gate_bias_ES)
    # If loads go through buffers (AMD), a tile has one base address.
    together = weights.gate_ESD is not None and not has_buffers()
    shape = {"E": E, "S": S, "D": D, "ACTIVATION": weights.activation, "TOGETHER": together}
    grouped = None  # one block of tokens reads each expert once in either form
    if len(count_M) > 1:
        config = GROUPED | {"BLOCK_F": min(GROUPED["BLOCK_F"], max(16, triton.next_power_of_2(S)))}
        tokens_EN, count_E = list_groups(mask_NE)
        grouped = choose_form(count_E, count_M, config["BLOCK_M"], GROUPED_COST_16THS)
        blocks = triton.cdiv(N, config["BLOCK_M"])
        prefill_grouped_kernel[(blocks * E * triton.cdiv(S, config["BLOCK_F"]),)](
            x_ND, *projections, tokens_EN, count_E, grouped, hidden_NF, N, **shape, **config
        )
    prefill_union_kernel[(triton.cdiv(E * S, tile["BLOCK_F"]) * len(count_M),)](
        x_ND, mask_NE, *projections, active_ME, count_M, grouped, hidden_NF, N, SWIZZLE=SWIZZLE, **shape, **tile
    )
    return hidden_NF

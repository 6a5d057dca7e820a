"""One token: programs stream the selected neurons, whole rows of all three matrices, and each sums its own share.

There are two launches. The first has as many programs as the device runs at once. Each reads the mask, streams its
share of the selected rows, and keeps its part of the output in registers. The second adds the parts in their order, so
the same input gives the same bits. The router before them is a third launch. Each may start before the previous launch
has ended (programmatic dependent launch), and waits before it reads the output of that launch.
"""

import torch
import triton
import triton.language as tl

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import (
    activate,
    add_bias,
    dependent,
    multiprocessors,
    signal_next,
    wait_for_last,
)

STREAM = {
    2: {"TILE": 8192, "num_warps": 8, "PER_SM": 2},
    4: {"TILE": 4096, "num_warps": 8, "PER_SM": 2},
}
"""By bytes per weight: numbers of each matrix per step, and programs per multiprocessor."""
SUM = {"BLOCK_D": 16, "num_warps": 4}


@triton.jit
def stream_kernel(
    x_ptr,
    mask_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    down_ptr,
    partial_ptr,
    E: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes sums [P, D]: each program's is over its share of the selected experts' rows, ROWS neurons at a time."""
    experts = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    wait_for_last(PDL)
    chosen = (tl.load(mask_ptr + experts, mask=experts < E, other=0) != 0).to(tl.int32)
    x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    signal_next(PDL)
    place = tl.cumsum(chosen, 0)
    # The programs' numbers of rows differ by at most one.
    rows = tl.sum(chosen, 0) * S
    begin = tl.program_id(0) * rows // tl.num_programs(0)
    end = (tl.program_id(0) + 1) * rows // tl.num_programs(0)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for slot in range(begin // S, tl.cdiv(end, S)):
        e = tl.sum((place <= slot).to(tl.int32), 0)  # the expert at that place among the chosen experts
        last = tl.minimum(end - slot * S, S)
        for first in range(tl.maximum(begin - slot * S, 0), last, ROWS):
            s = first + tl.arange(0, ROWS)
            f = (e * S + s).to(tl.int64)
            tile = f[:, None] * D + d[None, :]
            inside = (s[:, None] < last) & (d[None, :] < D)
            # All loads come before the first sum, so that the down rows load while gate and up are summed.
            up = tl.load(up_ptr + tile, mask=inside, other=0.0, eviction_policy="evict_first")
            if gate_ptr is not None:
                gate = tl.load(gate_ptr + tile, mask=inside, other=0.0, eviction_policy="evict_first")
            down = tl.load(down_ptr + tile, mask=inside, other=0.0, eviction_policy="evict_first")
            hidden = add_bias(tl.sum(up.to(tl.float32) * x[None, :], 1), up_bias_ptr, f, s < last)
            if gate_ptr is not None:
                gated = add_bias(tl.sum(gate.to(tl.float32) * x[None, :], 1), gate_bias_ptr, f, s < last)
                hidden = activate(gated, ACTIVATION) * hidden
            else:
                hidden = activate(hidden, ACTIVATION)
            acc += hidden[:, None] * down.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * D + d, tl.sum(acc, 0), mask=d < D)


@triton.jit(do_not_specialize=["P"])
def stream_sum_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    P,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes BLOCK_D outputs: the parts of all P programs in their order, and the bias."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    wait_for_last(PDL)
    signal_next(PDL)
    # Load all parts at once, because latency dominates.
    part = tl.load(partial_ptr + p[:, None] * D + d[None, :], mask=(p[:, None] < P) & (d[None, :] < D), other=0.0)
    y = add_bias(tl.sum(part, 0), bias_ptr, d, d < D)
    tl.store(y_ptr + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def tile_of(config: dict[str, int], D: int, rows: int) -> dict[str, int]:
    """Returns the launch arguments of a table's row: whole rows of D, as many as fill its tile, at most ``rows``."""
    width = triton.next_power_of_2(D)
    fitting = max(1, min(config["TILE"] // width, triton.next_power_of_2(rows)))
    return {"ROWS": fitting, "BLOCK_D": width, "num_warps": config["num_warps"]}


def run_stream(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output for one token.

    Args:
        x_ND: Contiguous input of one token.
        mask_NE: Contiguous bytes, 0 or 1.
        weights: Contiguous weights of the input's type.

    Returns:
        The output [1, D], accumulated in float32.
    """
    _, D = x_ND.shape
    E, S, _ = weights.up_ESD.shape
    config = STREAM[x_ND.element_size()]
    tile, pdl = tile_of(config, D, S), dependent()
    P = min(config["PER_SM"] * multiprocessors(x_ND.device), E * S)
    partial_PD = torch.empty((P, D), dtype=torch.float32, device=x_ND.device)
    stream_kernel[(P,)](
        x_ND,
        mask_NE,
        weights.up_ESD,
        weights.gate_ESD,
        weights.up_bias_ES,
        weights.gate_bias_ES,
        weights.down_ESD,
        partial_PD,
        E=E,
        S=S,
        D=D,
        ACTIVATION=weights.activation,
        BLOCK_E=triton.next_power_of_2(E),
        **tile,
        **pdl,
    )
    y_ND = torch.empty_like(x_ND)
    stream_sum_kernel[(triton.cdiv(D, SUM["BLOCK_D"]),)](
        partial_PD, weights.down_bias_D, y_ND, P, D=D, BLOCK_P=triton.next_power_of_2(P), **SUM, **pdl
    )
    return y_ND

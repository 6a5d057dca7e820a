"""Compute the mask of LTE's router: linear layer, sigmoid and threshold, in one launch for few tokens."""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from lte_lightning.kernels.triton.common import add_bias, check_device, dependent, signal_next, wait_for_last
from lte_lightning.kernels.triton.stream import tile_of

ROUTER = {2: {"TILE": 8192, "num_warps": 4}, 4: {"TILE": 4096, "num_warps": 4}}
ROUTER_FEW = {2: {"TILE": 8192, "num_warps": 8}, 4: {"TILE": 4096, "num_warps": 8}}
"""By bytes per number of the input: numbers of the router's weights per program, for one token and for a few."""

MAX_TOKENS = 16
"""Of more tokens torch computes the linear layer."""


@triton.jit(do_not_specialize=["N"])
def router_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    threshold_ptr,
    N,
    E: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes 1 where the score of one of ROWS experts exceeds the threshold, else 0, TOKENS tokens at a time."""
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    rows = tl.load(
        weight_ptr + e[:, None] * D + d[None, :], mask=(e[:, None] < E) & (d[None, :] < D), other=0.0
    )  # no launch writes weights, so they load before the previous launch has ended
    wait_for_last(PDL)
    signal_next(PDL)
    threshold = tl.load(threshold_ptr)
    rows = rows.to(x_ptr.dtype.element_ty).to(tl.float32)
    for n0 in range(0, N, TOKENS):
        n = n0 + tl.arange(0, TOKENS)
        x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        logits = tl.sum(rows[None, :, :] * x.to(tl.float32)[:, None, :], 2)
        logits = add_bias(logits, bias_ptr, e[None, :], e[None, :] < E)
        # Round as `selection.Router` does, so that both scores fall on the same side of the threshold.
        chosen = tl.sigmoid(logits.to(x_ptr.dtype.element_ty).to(tl.float32)) > threshold
        tl.store(mask_ptr + n[:, None] * E + e[None, :], chosen.to(tl.uint8), mask=(n[:, None] < N) & (e[None, :] < E))


@triton.jit(do_not_specialize=["count"])
def threshold_kernel(logits_ptr, mask_ptr, count, threshold_ptr, BLOCK: tl.constexpr):
    """Writes 1 where the sigmoid of a logit exceeds the threshold, else 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + i, mask=i < count, other=0.0)
    chosen = tl.sigmoid(logits.to(tl.float32)) > tl.load(threshold_ptr)
    tl.store(mask_ptr + i, chosen.to(tl.uint8), mask=i < count)


def route_triton(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: torch.Tensor
) -> torch.Tensor:
    """Computes the mask that `selection.Router` and a threshold give, without a gradient.

    Args:
        x_ND: The FFN's input, float32, bfloat16 or float16.
        weight_ED: The router's weights, contiguous, of any of these types.
        bias_E: The router's bias.
        threshold: tau, a single float32 number on the device. An expert runs where its score exceeds tau. Each launch
            reads it anew, so that a captured graph follows it.

    Returns:
        The mask [N, E], for `run_triton`.

    Raises:
        ValueError: For tensors on the wrong device, or weights that are not contiguous.
    """
    check_device(x_ND, {"weight_ED": weight_ED, "bias_E": bias_E, "threshold": threshold})
    return _triton_router(x_ND, weight_ED, bias_E, threshold)


@torch.library.custom_op("lte_lightning::triton_router", mutates_args=())
def _triton_router(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: torch.Tensor
) -> torch.Tensor:
    N, D = x_ND.shape
    E = len(weight_ED)
    mask_NE = torch.empty((N, E), dtype=torch.bool, device=x_ND.device)
    if N == 0:
        return mask_NE
    with torch.cuda.device_of(x_ND):
        if N <= MAX_TOKENS:
            # Four tokens at a time fill the registers with one row, as one token does with several rows.
            tokens, config = (1, ROUTER) if N == 1 else (4, ROUTER_FEW)
            tile = tile_of(config[x_ND.element_size()], D, E)
            router_kernel[(triton.cdiv(E, tile["ROWS"]),)](
                x_ND.contiguous(), weight_ED, bias_E, mask_NE.view(torch.uint8), threshold, N, E=E, D=D, TOKENS=tokens,
                **tile, **dependent(),
            )  # fmt: skip
            return mask_NE
        bias_E = None if bias_E is None else bias_E.to(x_ND.dtype)
        logits_NE = functional.linear(x_ND, weight_ED.to(x_ND.dtype), bias_E)
        threshold_kernel[(triton.cdiv(N * E, 1024),)](
            logits_NE, mask_NE.view(torch.uint8), N * E, threshold, BLOCK=1024
        )
    return mask_NE


@_triton_router.register_fake
def _(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: torch.Tensor
) -> torch.Tensor:
    return x_ND.new_empty((len(x_ND), len(weight_ED)), dtype=torch.bool)

"""LTE's router for few tokens in one launch: linear layer, sigmoid and threshold, straight to the mask."""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from lte_lightning.kernels.triton.common import accumulate, add_bias, check_device
from lte_lightning.kernels.triton.decode import HIDDEN, MAX_TOKENS, padded_tokens
from lte_lightning.kernels.triton.stream import route_stream


@triton.jit(do_not_specialize=["N"])
def router_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    N,
    threshold,
    E: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes 1 where the score of one of ROWS experts exceeds the threshold, else 0."""
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, TOKENS)
    logits = tl.zeros([ROWS, BLOCK_D if TOKENS == 1 else TOKENS], tl.float32)
    for d0 in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D)
        if TOKENS == 1:
            x = tl.load(x_ptr + d, mask=d < D, other=0.0)[None, :]
        else:
            x = tl.load(x_ptr + n[None, :] * D + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0)
        inside = (e[:, None] < E) & (d[None, :] < D)
        rows = tl.load(weight_ptr + e[:, None] * D + d[None, :], mask=inside, other=0.0)
        logits = accumulate(logits, rows.to(x.dtype), x, TOKENS)
    if TOKENS == 1:
        logits = tl.sum(logits, 1)[:, None]
    logits = add_bias(logits, bias_ptr, e[:, None], e[:, None] < E)
    # Rounded as `selection.Router` rounds, so that the two fall on the same side of the threshold.
    chosen = tl.sigmoid(logits.to(x_ptr.dtype.element_ty).to(tl.float32)) > threshold
    tl.store(mask_ptr + n[None, :] * E + e[:, None], chosen.to(tl.uint8), mask=(e[:, None] < E) & (n[None, :] < N))


def route_triton(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """Computes the mask that `selection.Router` and a threshold give; no gradient.

    Up to `MAX_TOKENS` tokens it is one launch in place of four; more go through torch.

    Args:
        x_ND: The FFN's input, float32, bfloat16 or float16.
        weight_ED: The router's weights, contiguous, of any of these types.
        bias_E: Its bias.
        threshold: tau; an expert runs where its score exceeds it.

    Returns:
        The mask [N, E], to be handed to `run_triton`.

    Raises:
        ValueError: For tensors on the wrong device, or weights that are not contiguous.
    """
    check_device(x_ND, {"weight_ED": weight_ED, "bias_E": bias_E})
    return _triton_router(x_ND, weight_ED, bias_E, threshold)


@torch.library.custom_op("lte_lightning::triton_router", mutates_args=())
def _triton_router(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    N, D = x_ND.shape
    E = len(weight_ED)
    if not 0 < N <= MAX_TOKENS:
        bias = None if bias_E is None else bias_E.to(x_ND.dtype)
        return functional.linear(x_ND, weight_ED.to(x_ND.dtype), bias).float().sigmoid() > threshold
    mask_NE = torch.empty((N, E), dtype=torch.bool, device=x_ND.device)
    if N == 1:
        with torch.cuda.device_of(x_ND):
            route_stream(x_ND.contiguous(), weight_ED, bias_E, threshold, mask_NE.view(torch.uint8))
        return mask_NE
    tokens = padded_tokens(N)
    config = HIDDEN[x_ND.element_size(), tokens]
    with torch.cuda.device_of(x_ND):
        router_kernel[(triton.cdiv(E, config["ROWS"]),)](
            x_ND.contiguous(), weight_ED, bias_E, mask_NE.view(torch.uint8), N, threshold,
            E=E, D=D, TOKENS=tokens, **config,
        )  # fmt: skip
    return mask_NE


@_triton_router.register_fake
def _(x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: float) -> torch.Tensor:
    return x_ND.new_empty((len(x_ND), len(weight_ED)), dtype=torch.bool)

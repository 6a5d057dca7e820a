"""Train without the experts that no token selected: forward and backward by the CPU kernels.

Frozen routers fix a batch's selection before its forward pass. The gradients of equation 2 of the paper need only the
experts that a token ran. Shapes: N tokens, P pairs of a token and an expert that it runs, E experts of S neurons,
D width.
"""

from collections.abc import Callable
from typing import Any

import torch

from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.processor import cpu_flags
from lte_lightning.kernels.cpu.train import Pairs, training_type
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights, hidden_activations

# By type: (cost of a pair relative to one in a dense product, overhead of an expert in tokens), from two cores of Zen 4
# with a margin. Where torch multiplies bfloat16 in tiles (AMX), a pair is estimated to cost as much as eight.
_COSTS = {torch.float32: (1.4, 50), torch.bfloat16: (1.4, 110)}
_AMX = (8.0, 600)


def skips(mask_NE: torch.Tensor, dtype: torch.dtype) -> bool:
    """Says whether skipping is expected to be faster than computing every expert.

    The answer depends on the mask, the type and the kind of processor. A clock has no part in it, so that a resumed fit
    repeats an uninterrupted fit.
    """
    if dtype not in _COSTS:
        return False
    N, E = mask_NE.shape
    pair, expert = _AMX if dtype == torch.bfloat16 and "amx_bf16" in cpu_flags() else _COSTS[dtype]
    return pair * int(mask_NE.count_nonzero()) + expert * E < N * E


def run_skipping(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output, which is differentiable once for the input, weights and biases.

    Sums of products are float32, and do not depend on the number of threads. The backward pass keeps only the
    activations of the pairs. Without compiled kernels, and in other types than float32 and bfloat16, every expert is
    computed and masked.

    Args:
        x_ND: Input of N tokens, of the weights' type.
        mask_NE: True where a token runs an expert.
        weights: The FFN; its views need not be contiguous.

    Returns:
        The output [N, D] in the type of ``x_ND``.

    Raises:
        UserError: In a backward pass with ``create_graph``.
    """
    _, S, D = weights.up_ESD.shape
    computed = training_type(x_ND.dtype, S, D)
    if computed is None:
        return run_dense_mask(x_ND, mask_NE, weights)
    w = weights.to(computed)
    tensors = (w.up_ESD, w.up_bias_ES, w.gate_ESD, w.gate_bias_ES, w.down_ESD)
    out_ND = _Selected.apply(x_ND.to(computed), mask_NE, ACTIVATIONS[w.activation], *tensors)
    return (out_ND if w.down_bias_D is None else out_ND + w.down_bias_D).to(x_ND.dtype)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        mask_NE: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        up_ESD: torch.Tensor,
        up_bias_ES: torch.Tensor | None,
        gate_ESD: torch.Tensor | None,
        gate_bias_ES: torch.Tensor | None,
        down_ESD: torch.Tensor,
    ) -> torch.Tensor:
        x_ND, down_ESD = x_ND.contiguous(), down_ESD.contiguous()
        halves = [up_ESD.contiguous()] + ([] if gate_ESD is None else [gate_ESD.contiguous()])
        pairs = Pairs(mask_NE, *up_ESD.shape[1:])
        projected_PS = pairs.from_rows(x_ND, halves, [up_bias_ES, gate_bias_ES][: len(halves)])
        _, hidden_PS = hidden_activations(activation, *projected_PS)
        ctx.pairs, ctx.activation = pairs, activation
        ctx.save_for_backward(x_ND, down_ESD, *halves, *projected_PS)
        return pairs.to_rows([hidden_PS], [down_ESD])

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # the second derivative would silently lack a part
            raise UserError(
                "skipped experts have no second derivative (create_graph=True); set model.skip_experts to false"
            )
        pairs, grad_ND = ctx.pairs, grad_ND.contiguous()
        x_ND, down_ESD, *saved = ctx.saved_tensors
        halves, projected_PS = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        wants_x, _, _, *wants_halves, wants_down = ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [projected.detach().requires_grad_() for projected in projected_PS]
            _, hidden_PS = hidden_activations(ctx.activation, *leaves)
        (grad_hidden_PS,) = pairs.from_rows(grad_ND, [down_ESD], [None])
        grads_PS = torch.autograd.grad(hidden_PS, leaves, grad_hidden_PS)
        x_grad = pairs.to_rows(grads_PS, halves) if wants_x else None
        down_grad = pairs.to_weights([hidden_PS.detach()], grad_ND)[0] if wants_down else None
        wanted = [which for which in range(len(halves)) if wants_halves[2 * which]]
        of_weights = pairs.to_weights([grads_PS[which] for which in wanted], x_ND) if wanted else []
        half_grads: list[torch.Tensor | None] = [None] * 4  # of up: weight, bias; of gate: weight, bias
        for which, grad in zip(wanted, of_weights, strict=True):
            half_grads[2 * which] = grad
        for which, grad in enumerate(grads_PS):
            if wants_halves[2 * which + 1]:
                half_grads[2 * which + 1] = pairs.to_biases(grad).to(grad.dtype)
        return (x_grad, None, None, *half_grads, down_grad)

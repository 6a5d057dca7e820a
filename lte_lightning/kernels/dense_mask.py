"""The dense-mask backend. It computes every expert and scales its output, and is differentiable."""

import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights, hidden_activations
from lte_lightning.kernels.views import run_views


def scale_experts(hidden_BTF: torch.Tensor, factor_BTE: torch.Tensor) -> torch.Tensor:
    """Scales each expert's slice of the hidden activations.

    Args:
        hidden_BTF: Activations whose neurons are ordered by expert, F = E * S.
        factor_BTE: Scores that scale each expert (equation 3), or a boolean mask of the experts to keep (equation 2).
            A mask also clears nonfinite values.

    Returns:
        The scaled activations, [B, T, F], in the type of ``hidden_BTF``.
    """
    hidden_BTES = hidden_BTF.unflatten(-1, (factor_BTE.shape[-1], -1))
    if factor_BTE.dtype == torch.bool:
        return hidden_BTES.masked_fill(~factor_BTE.unsqueeze(-1), 0.0).flatten(-2)
    return (hidden_BTES * factor_BTE.to(hidden_BTF.dtype).unsqueeze(-1)).flatten(-2)


def dense_hidden(x_ND: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Returns the hidden activations of every expert, [N, F], in the type of ``x_ND``."""
    up_NF = _project(x_ND, weights.up_ESD, weights.up_bias_ES)
    gate_NF = None if weights.gate_ESD is None else _project(x_ND, weights.gate_ESD, weights.gate_bias_ES)
    return hidden_activations(ACTIVATIONS[weights.activation], up_NF, gate_NF)[1]


def run_dense_mask(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes every expert in matrix products of the weights' own type, and clears the unselected ones.

    A nonfinite row of the down projection would spoil all tokens, because a cleared activation times NaN is NaN. In
    that case `run_views` computes each expert for only the tokens that selected it.

    Args:
        x_ND: Input of N tokens, of the weights' type.
        mask_NE: True where a token runs an expert.
        weights: The FFN.

    Returns:
        The output [N, D] in the type of ``x_ND``.
    """
    hidden_NF = dense_hidden(x_ND, weights)
    if not mask_NE.all():
        hidden_NF = scale_experts(hidden_NF, mask_NE)
    out_ND = functional.linear(hidden_NF, weights.down_ESD.flatten(0, 1).T, weights.down_bias_D)
    return out_ND if out_ND.sum(dtype=torch.float32).isfinite() else run_views(x_ND, mask_NE, weights)


def _project(x_ND: torch.Tensor, weight_ESD: torch.Tensor, bias_ES: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x_ND, weight_ESD.flatten(0, 1), None if bias_ES is None else bias_ES.flatten())

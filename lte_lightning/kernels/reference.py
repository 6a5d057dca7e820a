"""The oracle: each expert in turn, in float32, over the tokens that selected it."""

import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights, hidden_activations


def run_reference(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output, slowly and plainly. Every backend must agree with it.

    Args:
        x_ND: Input of N tokens.
        mask_NE: True where a token runs an expert. The weights of an expert that no token runs are not read.
        weights: The FFN.

    Returns:
        The output [N, D] in the type of ``x_ND``, accumulated in float32.
    """
    x = x_ND.float()
    out_ND = torch.zeros_like(x)
    for e in mask_NE.any(dim=0).nonzero().flatten().tolist():
        rows = mask_NE[:, e].nonzero().flatten()
        up = functional.linear(x[rows], weights.up_ESD[e].float(), _bias(weights.up_bias_ES, e))
        gate = None
        if weights.gate_ESD is not None:
            gate = functional.linear(x[rows], weights.gate_ESD[e].float(), _bias(weights.gate_bias_ES, e))
        _, hidden = hidden_activations(ACTIVATIONS[weights.activation], up, gate)
        out_ND[rows] += hidden @ weights.down_ESD[e].float()
    if weights.down_bias_D is not None:
        out_ND += weights.down_bias_D.float()
    return out_ND.to(x_ND.dtype)


def _bias(bias_ES: torch.Tensor | None, e: int) -> torch.Tensor | None:
    return None if bias_ES is None else bias_ES[e].float()

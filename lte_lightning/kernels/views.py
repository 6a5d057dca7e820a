"""Run selected experts in plain torch over views of their weights: without copies, on any device, in any type."""

from itertools import pairwise

import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights, hidden_activations


def run_views(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output, in matrix products of the weights' own type.

    One product serves neighbouring experts that the same tokens selected. Products are added in float32.

    Args:
        x_ND: Input of N tokens, of the weights' type.
        mask_NE: True where a token runs an expert. The weights of an expert that no token runs are not read.
        weights: The FFN.

    Returns:
        The output [N, D] in the type of ``x_ND``.
    """
    out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    if weights.down_bias_D is not None:
        out_ND += weights.down_bias_D
    for begin, end in _runs(mask_NE):
        rows = mask_NE[:, begin].nonzero().flatten()
        x = x_ND if len(rows) == len(x_ND) else x_ND[rows]

        def project(weight_ESD: torch.Tensor, bias_ES: torch.Tensor | None, x: torch.Tensor = x) -> torch.Tensor:
            bias = None if bias_ES is None else bias_ES[begin:end].flatten()  # noqa: B023 - called in this round only
            return functional.linear(x, weight_ESD[begin:end].flatten(0, 1), bias)  # noqa: B023

        up = project(weights.up_ESD, weights.up_bias_ES)
        gate = None if weights.gate_ESD is None else project(weights.gate_ESD, weights.gate_bias_ES)
        _, hidden = hidden_activations(ACTIVATIONS[weights.activation], up, gate)
        added = (hidden @ weights.down_ESD[begin:end].flatten(0, 1)).float()
        if len(rows) == len(x_ND):
            out_ND += added
        else:
            out_ND.index_add_(0, rows, added)
    return out_ND.to(x_ND.dtype)


def _runs(mask_NE: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the ranges of neighbouring experts that the same tokens run, without experts that no token runs."""
    columns_EN = mask_NE.T.contiguous()
    changes = (columns_EN[1:] != columns_EN[:-1]).any(dim=1).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(columns_EN)]
    active_E = columns_EN.any(dim=1).tolist()
    return [(begin, end) for begin, end in pairwise(bounds) if active_E[begin]]

"""What a user would try first to skip experts, each on the same weights and masks, router paid."""

from collections.abc import Callable

import torch
from torch.nn import functional

from lte_lightning.kernels.cpu_ffn import library
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.views import run_views

Rival = Callable[[torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]


def index_select(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Gathers the rows of every expert that some token runs, and multiplies."""
    union = mask_NE.any(dim=0).nonzero().flatten()
    chosen = ExpertWeights(
        weights.up_ESD.index_select(0, union),
        weights.down_ESD.index_select(0, union),
        weights.activation,
        None if weights.gate_ESD is None else weights.gate_ESD.index_select(0, union),
        None if weights.up_bias_ES is None else weights.up_bias_ES.index_select(0, union),
        None if weights.gate_bias_ES is None else weights.gate_bias_ES.index_select(0, union),
        weights.down_bias_D,
    )
    return run_dense_mask(x_ND, mask_NE.index_select(1, union), chosen)


def executed_width(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """A dense FFN as wide as what a token executes: the wrong result, and the time of a perfect gather."""
    experts = int(mask_NE[0].sum())

    def project(weight_ESD: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_ND, weight_ESD[:experts].flatten(0, 1))

    hidden_NF = project(weights.up_ESD)
    if weights.gate_ESD is None:
        hidden_NF = ACTIVATIONS[weights.activation](hidden_NF)
    else:
        hidden_NF = ACTIVATIONS[weights.activation](project(weights.gate_ESD)) * hidden_NF
    return hidden_NF @ weights.down_ESD[:experts].flatten(0, 1)


def make_rivals(device: torch.device) -> dict[str, Rival]:
    """Returns the rivals by name; torch compiles at the first call, and is left out where there is no compiler."""
    rivals: dict[str, Rival] = {
        "index_select": index_select,
        "expert-views": run_views,
        "executed-width": executed_width,
    }
    if device.type == "cuda" or library() is not None:
        torch.compiler.reset()  # or after some sizes it would say that it compiles no more, and run as it is
        rivals["compiled-mask"] = torch.compile(run_dense_mask, dynamic=False)
    return rivals

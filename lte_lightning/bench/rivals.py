"""Simple ways to skip experts that a user would try first. All use the same weights and masks, and run the router."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.dense_mask import dense_hidden, run_dense_mask, scale_experts
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.views import run_views

Rival = Callable[[torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]
GATHERING = ("index_select", "expert-views")  # read rows by neuron; the others use the down projection of a Linear


def index_select(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Gathers the rows of every expert that at least one token runs, and multiplies."""
    union = mask_NE.any(dim=0).nonzero().flatten()
    return run_dense_mask(x_ND, mask_NE.index_select(1, union), _some(weights, lambda t: t.index_select(0, union)))


def executed_width(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """A dense FFN with as many neurons as a token executes: a wrong result in the time of a perfect gather."""
    experts = int(mask_NE[0].sum())
    first = _some(weights, lambda tensor: tensor[:experts])
    return _down(dense_hidden(x_ND, first), first)


def masked(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Runs all experts, then applies the mask; meant for ``torch.compile``."""
    return _down(scale_experts(dense_hidden(x_ND, weights), mask_NE), weights)


def with_dense_down(weights: ExpertWeights) -> ExpertWeights:
    """Returns weights whose down projection is stored as a Linear's, [D, F]; torch multiplies by it faster."""
    down_DF = weights.down_ESD.flatten(0, 1).T.contiguous()
    return replace(weights, down_ESD=down_DF.T.unflatten(0, weights.down_ESD.shape[:2]))


def _some(weights: ExpertWeights, take: Callable[[torch.Tensor], torch.Tensor]) -> ExpertWeights:
    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else take(tensor)

    return replace(
        weights,
        up_ESD=take(weights.up_ESD),
        down_ESD=take(weights.down_ESD),
        gate_ESD=part(weights.gate_ESD),
        up_bias_ES=part(weights.up_bias_ES),
        gate_bias_ES=part(weights.gate_bias_ES),
    )


def _down(hidden_NF: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    return functional.linear(hidden_NF, weights.down_ESD.flatten(0, 1).T, weights.down_bias_D)


def make_rivals(device: torch.device) -> dict[str, Rival]:
    """Returns the rivals by name; the compiled rival compiles at its first call, and is left out without a compiler."""
    rivals: dict[str, Rival] = {
        "index_select": index_select,
        "expert-views": run_views,
        "executed-width": executed_width,
    }
    if device.type == "cuda" or library() is not None:
        torch.compiler.reset()  # else torch reaches its recompilation limit after a few sizes, and runs eagerly
        rivals["compiled-mask"] = torch.compile(masked, dynamic=False, fullgraph=True)
    return rivals

"""Routers that are never trained."""

import math

import torch

from lte_lightning.selection.facts import FfnShape
from lte_lightning.selection.ranking import Ranking
from lte_lightning.selection.registry import register_selector


@register_selector("random")
class RandomRouter(Ranking):
    """Routers that are never trained: the top experts of a random linear map.

    Source: the paper (see `Router`), figure 12.

    Cost: D * E multiply-adds per token, like LTE's router.
    """

    label = "random routers"
    weight: torch.Tensor

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        weight_ED = torch.randn(shape.experts, shape.width, generator=generator) / math.sqrt(shape.width)
        self.register_buffer("weight", weight_ED)

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns random projections of the input."""
        return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype)).float()

    def flops_per_token(self) -> int:
        """Returns 2 D E."""
        return 2 * self.weight.numel()

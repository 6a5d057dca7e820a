"""Baselines that need no training: they rank by activations that they have computed, or by chance."""

import math

import torch

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.ranking import Ranking


class Magnitude(Ranking):
    """Ranks experts by the sum of the magnitudes of what the selector reads."""

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the sum of |activation| over each expert."""
        return self.magnitude(given)


class KeepLargest(Magnitude):
    """KLA of the paper's section 5.1: keeps the neurons with the largest |activation|, per token.

    An oracle: it reads the activations that it saves, and is charged nothing for them. With experts of one neuron it is
    the paper's baseline; with larger ones, whose |activations| are summed, it is the ground truth of MoEfication
    (Zhang et al. 2022), which for ReLU sums the positive activations.
    """

    reads = "hidden"


class Cats(Magnitude):
    """CATS (Lee et al. 2024): a threshold on the |activated gate|, one per layer, calibrated on training rows.

    Charged the gate projection (of a plain FFN: the up projection) whole, since every neuron's is computed. No oracle:
    what it reads it has paid for. Each layer's level is calibrated behind layers that are sparse already, or the
    sparsity that is asked for would be missed; the authors calibrate on the dense model.
    """

    rule = "level"
    reads = "gate"

    def whole_projections(self) -> int:
        """Returns 1: the gate, or up, projection."""
        return 1


class Narrow(Magnitude):
    """A narrower dense FFN: for every token the experts whose activations are largest on average on training rows.

    The honest alternative to any selection per token, with nothing to be charged for. No oracle.
    """

    rule = "fixed"
    reads = "hidden"


class RandomRouter(Ranking):
    """Routers that are never trained (the paper's figure 12): the top experts of a random linear map.

    Charged D * E multiply-adds, like LTE's. No oracle.
    """

    weight: torch.Tensor

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        weight_ED = torch.randn(shape.experts, shape.width, generator=generator) / math.sqrt(shape.width)
        self.register_buffer("weight", weight_ED)

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns random projections of the input."""
        return torch.nn.functional.linear(given, self.weight.to(given.dtype)).float()

    def flops_per_token(self) -> int:
        """Returns 2 D E."""
        return 2 * self.weight.numel()

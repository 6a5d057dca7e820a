"""Deja Vu: a low-rank predictor of every neuron's magnitude."""

import math

import torch
from torch.nn import functional

from lte_lightning.selection.predictor import Predictor


class DejaVu(Predictor):
    """Deja Vu (Liu et al. 2023) as the paper uses it: a low-rank predictor of every neuron's magnitude.

    Meant for experts of one neuron; of larger ones it predicts the sum. It is trained by squared error on
    |activation| in units of the layer's mean; the authors, whose models have ReLU, classify whether it is above 0. The
    rank is D / 12, as theirs is in OPT-175B (1,000 of 12,288). Charged rank * (D + E) multiply-adds. No oracle. With an
    expert stage it is the paper's fine-tuned variant.
    """

    def inner_width(self) -> int:
        """Returns D / 12, rounded up."""
        return math.ceil(self.shape.width / 12)

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error."""
        mass_NE = self.magnitude(hidden_NF)
        return functional.mse_loss(self.predict(x_ND), mass_NE / mass_NE.mean().clamp_min(1e-9))

"""MoEfication's learned router."""

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.predictor import Predictor


class Moefication(Predictor):
    """MoEfication's learned router (Zhang et al. 2022): a two-layer tanh network of width E picks the top experts.

    As in the authors' code it sees the input's direction, has no biases and ends in a matrix that starts as the
    identity, and it is trained by binary cross-entropy towards each expert's |activation| as a share of the largest in
    the batch. Theirs starts at the experts' mean weights, this at random, and both learn at a rate of 0.01. They swap
    the activation for ReLU and fine-tune first: ``model.activation relu`` in the dense stage. Charged D * E + E * E
    multiply-adds. No oracle.
    """

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.second = nn.Parameter(torch.eye(shape.experts))
        self.bias = None

    def inner_width(self) -> int:
        """Returns E."""
        return self.shape.experts

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies tanh."""
        return first.tanh()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [..., E], float32, for the direction of x."""
        return super().predict(functional.normalize(x, dim=-1))

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the binary cross-entropy."""
        mass_NE = self.magnitude(hidden_NF)
        return functional.binary_cross_entropy_with_logits(self.predict(x_ND), mass_NE / mass_NE.max().clamp_min(1e-9))

"""Baselines that learn to predict, from the FFN's input, what its neurons will do; the model stays as it is."""

import math

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.ranking import Ranking


class Predictor(Ranking):
    """A ranking by a network that is trained, in the router stage, on what the dense model does.

    Charged both its matrices for every token. No oracle: it reads the FFN's input.

    Args:
        shape: The FFN's sizes.
        sparsity: Share of the experts that shall not run.
        generator: Source of the initial weights.
    """

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        inner = self.inner_width()
        # not nn.Linear: it would take its first weights from the global generator
        self.first = nn.Parameter(torch.randn(inner, shape.width, generator=generator) / shape.width**0.5)
        self.second = nn.Parameter(torch.randn(shape.experts, inner, generator=generator) / inner**0.5)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(shape.experts))

    def inner_width(self) -> int:
        """Returns the width of the network's inner layer."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_width")

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies the inner activation."""
        return first

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [..., E], float32."""
        first = self.inner(functional.linear(x, self.first.to(x.dtype)))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(first, self.second.to(x.dtype), bias).float()

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the prediction."""
        return self.predict(given)

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns how wrong the prediction is, a scalar.

        Args:
            x_ND: The FFN's input.
            hidden_NF: Its activations.
            down_FD: The down projection, a row per neuron.
        """
        raise NotImplementedError(f"{type(self).__name__} must define imitation_loss")


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


class D2dmoe(Predictor):
    """D2DMoE (Szatkowski et al. 2024): regresses the norm of each expert's output; dynamic-k.

    Experts run whose predicted norm exceeds a share of their token's largest; the share is one for all layers, as the
    authors', and calibrated. The network is two layers, 128 wide, with ReLU inside and the absolute value at its end;
    squared error in units of the layer's mean. Before that the authors fine-tune the dense model towards sparse
    activations, which is left out: all methods start from the same model. Charged 128 * (D + E) multiply-adds. No
    oracle.
    """

    rule = "common"

    def inner_width(self) -> int:
        """Returns 128."""
        return 128

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies ReLU."""
        return first.relu()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the norms [..., E], float32."""
        return super().predict(x).abs()

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the predicted norms, each as a share of its token's largest."""
        norms = self.predict(given)
        return norms / norms.amax(-1, keepdim=True).clamp_min(1e-9)

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error."""
        down_ESD = down_FD.float().unflatten(0, (self.shape.experts, -1))
        hidden_NES = hidden_NF.float().unflatten(-1, (self.shape.experts, -1))
        # |h W| by the Gram matrix of W: [E, S, S] instead of outputs [N, E, D]
        gram_ESS = down_ESD @ down_ESD.mT
        norm_NE = torch.einsum("nes,est,net->ne", hidden_NES, gram_ESS, hidden_NES).clamp_min(0.0).sqrt()
        return functional.mse_loss(self.predict(x_ND), norm_NE / norm_NE.mean().clamp_min(1e-9))

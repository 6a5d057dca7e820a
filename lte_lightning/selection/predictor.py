"""Baselines that learn to predict, from the FFN's input, what its neurons will do; the model stays as it is."""

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.ranking import Ranking


class Predictor(Ranking):
    """A ranking by a network that is trained, in the router stage, on what the dense model does.

    Charged all its matrices for every token.

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
        self.bias = nn.Parameter(torch.zeros(shape.experts))

    def inner_width(self) -> int:
        """Returns the width of the network's inner layer."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_width")

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies the inner activation."""
        return first

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [..., E], float32."""
        first = self.inner(functional.linear(x, self.first.to(x.dtype)))
        return functional.linear(first, self.second.to(x.dtype), self.bias.to(x.dtype)).float()

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
    """MoEfication's learned router (Zhang et al. 2022): a two-layer tanh network of width D picks the top experts.

    It is trained by cross-entropy towards each expert's share of its token's |activation|. The authors swap the
    activation for ReLU and fine-tune first: ``model.activation relu`` in the dense stage.
    """

    def inner_width(self) -> int:
        """Returns D."""
        return self.shape.width

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies tanh."""
        return first.tanh()

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy."""
        mass_NE = self.magnitude(hidden_NF)
        share_NE = mass_NE / mass_NE.sum(-1, keepdim=True).clamp_min(1e-9)
        return functional.cross_entropy(self.predict(x_ND), share_NE)


class DejaVu(Predictor):
    """Deja Vu (Liu et al. 2023) as the paper uses it: a low-rank predictor of every neuron's magnitude.

    Meant for experts of one neuron; of larger ones it predicts the sum. It is trained by squared error on
    |activation| in units of the layer's mean. Rank D / 4. With an expert stage it is the paper's fine-tuned variant.
    """

    def inner_width(self) -> int:
        """Returns D / 4."""
        return max(1, self.shape.width // 4)

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error."""
        mass_NE = self.magnitude(hidden_NF)
        return functional.mse_loss(self.predict(x_ND), mass_NE / mass_NE.mean().clamp_min(1e-9))


class D2dmoe(Predictor):
    """D2DMoE (Szatkowski et al. 2024): regresses the norm of each expert's output; dynamic-k.

    Experts run whose predicted norm is at least a share of their token's largest; the share is the layer's level,
    calibrated. The network is two layers, 128 wide, with ReLU; squared error in units of the layer's mean.
    """

    rule = "level"

    def inner_width(self) -> int:
        """Returns 128."""
        return 128

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies ReLU."""
        return first.relu()

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the predicted norms, each as a share of its token's largest."""
        norms = self.predict(given).clamp_min(0.0)
        return norms / norms.amax(-1, keepdim=True).clamp_min(1e-9)

    def imitation_loss(self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, down_FD: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error."""
        down_ESD = down_FD.float().unflatten(0, (self.shape.experts, -1))
        hidden_NES = hidden_NF.float().unflatten(-1, (self.shape.experts, -1))
        # |h W| by the Gram matrix of W: [E, S, S] instead of outputs [N, E, D]
        gram_ESS = down_ESD @ down_ESD.mT
        norm_NE = torch.einsum("nes,est,net->ne", hidden_NES, gram_ESS, hidden_NES).clamp_min(0.0).sqrt()
        return functional.mse_loss(self.predict(x_ND), norm_NE / norm_NE.mean().clamp_min(1e-9))

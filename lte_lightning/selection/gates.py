"""Routers of mixtures of experts: trained with the task, and what an expert gives is scaled by its gate."""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.ranking import Ranking


class Gates(Ranking):
    """Keeps, per token, the experts whose logits x W_g are largest, and scales what each of them gives by its gate.

    The gates scale in hard mode too, as in both originals. They learn with the task in the router stage, where there
    is a balance loss besides; from then on they are frozen, and neither noise nor dropout disturbs them. Charged D * E
    multiply-adds per token, like LTE's router. No oracle.
    """

    scales = True
    balance_weight: ClassVar[float]
    weight: nn.Parameter

    @property
    def learning(self) -> bool:
        """Whether the gates are being trained."""
        return self.training and self.weight.requires_grad

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W_g, [..., E], float32."""
        return functional.linear(x, self.weight.to(x.dtype)).float()

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the gates of the experts that are kept, [..., K], from their importance."""
        raise NotImplementedError(f"{type(self).__name__} must define gate")

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the gates [B, T, E], float32, 0 for the experts that do not run."""
        importance = self.importance(given)
        best = importance.topk(self.keep, dim=-1)
        return torch.zeros_like(importance).scatter(-1, best.indices, self.gate(best.values))

    def balance_loss(self, x_ND: torch.Tensor, gates_NE: torch.Tensor) -> torch.Tensor:
        """Returns how unevenly the experts are used by N tokens, a scalar, to be weighted by ``balance_weight``.

        Args:
            x_ND: The FFN's input.
            gates_NE: What `forward` returned for it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define balance_loss")

    def flops_per_token(self) -> int:
        """Returns 2 D E."""
        return 2 * self.weight.numel()

    def weights_read(self) -> int:
        """Returns D E."""
        return self.weight.numel()


class NoisySoftmax(Gates):
    """Noisy top-k softmax gating (Shazeer et al. 2017; section 3.2 of the paper, which finds that it fails).

    Gates are the softmax over the k largest of ``x W_g + softplus(x W_noise) * N(0, 1)``, and sum to 1; the noise is
    there only while the gates learn. Both matrices start at zero. The balance loss is the original's importance loss,
    the squared coefficient of variation of the experts' summed gates, at its weight of 0.1. With gates around 1/k a
    dense model's experts are scaled down to nearly nothing from the first step: the failure that the paper describes.
    The load loss, which for
    the same purpose estimates how many tokens each expert gets, is left out: the authors found that either does.
    """

    balance_weight = 0.1

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.weight = nn.Parameter(torch.zeros(shape.experts, shape.width))
        self.noise_weight = nn.Parameter(torch.zeros(shape.experts, shape.width))

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the logits, with noise while they are trained."""
        logits = self.logits(given)
        if not self.learning:
            return logits
        spread = functional.softplus(functional.linear(given, self.noise_weight.to(given.dtype)).float())
        return logits + spread * torch.randn_like(logits)

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the softmax over those that are kept."""
        return best.softmax(-1)

    def balance_loss(self, x_ND: torch.Tensor, gates_NE: torch.Tensor) -> torch.Tensor:
        """Returns the squared coefficient of variation of the gates' sums over the tokens."""
        importance_E = gates_NE.sum(0)
        return importance_E.var(correction=0) / importance_E.mean().square().clamp_min(1e-9)


class SigmaMoe(Gates):
    """sigma-MoE (Csordas et al. 2023; section 5.5 of the paper): the top k of ``sigmoid(x W_g)``, not renormalised.

    While the gates learn, each is dropped for a token with a probability of 0.05 (set to zero before the choice, and
    nothing is scaled up for it). The balance loss is the negative entropy of the mean over tokens of
    ``softmax(x W_g)``, at a weight of 0.001. Both figures are those that the authors recommend. As in theirs the rows
    of W_g start with equal norms, here 1, so that inputs of unit root mean square give logits of standard deviation 1.
    The original trains its experts from scratch; here they are those of the dense model.
    """

    balance_weight = 0.001
    dropout: ClassVar[float] = 0.05

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.weight = nn.Parameter(functional.normalize(torch.randn(shape.experts, shape.width, generator=generator)))

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the logits, those of dropped experts at minus infinity."""
        logits = self.logits(given)
        if not self.learning:
            return logits
        return logits.masked_fill(torch.rand_like(logits) < self.dropout, -torch.inf)

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the sigmoid of each."""
        return best.sigmoid()

    def balance_loss(self, x_ND: torch.Tensor, gates_NE: torch.Tensor) -> torch.Tensor:
        """Returns the negative entropy of the mean choice, at least -log E."""
        log_share_E = self.logits(x_ND).log_softmax(-1).logsumexp(0) - math.log(len(x_ND))
        return (log_share_E.exp() * log_share_E).sum()

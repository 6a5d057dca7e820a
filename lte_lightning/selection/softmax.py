"""Noisy top-k softmax gating."""

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.facts import FfnShape
from lte_lightning.selection.gates import Gates
from lte_lightning.selection.registry import register_selector


@register_selector("softmax")
class NoisySoftmax(Gates):
    """Noisy top-k softmax gating, which the paper (see `Router`) finds to fail in its section 3.2.

    Source: Noam Shazeer, Azalia Mirhoseini, Krzysztof Maziarz, Andy Davis, Quoc Le, Geoffrey Hinton, Jeff Dean:
    "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017, arXiv 1701.06538.
    Equations 3 to 5 are the gates, 6 and 7 the importance loss.

    Gates are the softmax over the k largest of ``x W_g + softplus(x W_noise) * N(0, 1)``, and sum to 1; the noise is
    there only while the gates learn. Both matrices start at zero. The balance loss is the original's importance loss,
    the squared coefficient of variation of the experts' summed gates, at its weight of 0.1. With gates around 1/k a
    dense model's experts are scaled down to nearly nothing from the first step: the failure that the paper describes.
    The load loss, which estimates how many tokens each expert gets, is left out: the authors found either loss
    sufficient. Cost: D * E multiply-adds per token.
    """

    label = "noisy top-k softmax"
    balance_weight = 0.1

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.weight = nn.Parameter(torch.zeros(shape.experts, shape.width))
        self.noise_weight = nn.Parameter(torch.zeros(shape.experts, shape.width))

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the logits, with noise while they are trained."""
        logits = self.logits(inputs)
        if not self.learning:
            return logits
        spread = functional.softplus(functional.linear(inputs, self.noise_weight.to(inputs.dtype)).float())
        return logits + spread * torch.randn_like(logits)

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the softmax over those that are kept."""
        return best.softmax(-1)

    def balance_loss(self, x_ND: torch.Tensor, scores_NE: torch.Tensor) -> torch.Tensor:
        """Returns the squared coefficient of variation of the gates' sums over the tokens."""
        importance_E = scores_NE.sum(0)
        return importance_E.var(correction=0) / importance_E.mean().square().clamp_min(1e-9)

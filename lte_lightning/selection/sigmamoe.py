"""sigma-MoE: gates that are sigmoids, not renormalised."""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.facts import FfnShape
from lte_lightning.selection.gates import Gates
from lte_lightning.selection.registry import register_selector


@register_selector("sigmamoe")
class SigmaMoe(Gates):
    """sigma-MoE: the top k of ``sigmoid(x W_g)``, not renormalised.

    Source: Róbert Csordás, Kazuki Irie, Jürgen Schmidhuber: "Approximating Two-Layer Feedforward Networks for Efficient
    Transformers", Findings of EMNLP 2023, arXiv 2310.10837: output sum_{e in top k of s} s_e E_e(x) with
    s = sigmoid(x W_g). Compared in section 5.5 of the paper (see `Router`).

    While the gates learn, each is dropped for a token with a probability of 0.05 (set to zero before the choice, and
    nothing is scaled up for it). The balance loss is the negative entropy of the mean over tokens of
    ``softmax(x W_g)``, at a weight of 0.001. Both values are the authors' recommendations. As in theirs the rows
    of W_g start with equal norms, here 1, so that inputs of unit root mean square give logits of standard deviation 1.
    The original trains its experts from scratch; here they are those of the dense model. It costs D * E
    multiply-adds per token, like LTE's router.
    """

    label = "sigma-MoE"
    balance_weight = 0.001
    dropout: ClassVar[float] = 0.05

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.weight = nn.Parameter(functional.normalize(torch.randn(shape.experts, shape.width, generator=generator)))

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the logits, those of dropped experts at minus infinity."""
        logits = self.logits(inputs)
        if not self.learning:
            return logits
        return logits.masked_fill(torch.rand_like(logits) < self.dropout, -torch.inf)

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the sigmoid of each."""
        return best.sigmoid()

    def balance_loss(self, x_ND: torch.Tensor, scores_NE: torch.Tensor) -> torch.Tensor:
        """Returns the negative entropy of the mean choice, at least -log E."""
        log_share_E = self.logits(x_ND).log_softmax(-1).logsumexp(0) - math.log(len(x_ND))
        return (log_share_E.exp() * log_share_E).sum()

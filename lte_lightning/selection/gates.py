"""Routers of mixtures of experts: they train with the task, and a gate scales its expert's output."""

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.ranking import Ranking


class Gates(Ranking):
    """Keeps, per token, the experts whose logits x W_g are largest, and scales the output of each by its gate.

    The gates scale in hard mode too, as in both originals. They learn with the task and
    a balance loss in the router stage. After it they are frozen, without noise or dropout. It costs D * E
    multiply-adds per token, like LTE's router.
    """

    scales = True
    graded = True
    learns = "balance"
    weight: nn.Parameter

    @property
    def learning(self) -> bool:
        """Whether the gates are being trained."""
        return self.training and self.weight.requires_grad

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W_g, [..., E], float32."""
        return functional.linear(x, self.weight.to(x.dtype)).float()

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Returns the methods that the class must define and does not."""
        return super().missing_methods() + [
            name for name in ("importance", "gate") if getattr(cls, name) is getattr(Gates, name)
        ]

    def gate(self, best: torch.Tensor) -> torch.Tensor:
        """Returns the gates of the experts that are kept, [..., K], from their importance."""
        raise NotImplementedError(f"{type(self).__name__} must define gate")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the gates [B, T, E], float32, 0 for the experts that do not run."""
        importance = self.importance(inputs)
        best = importance.topk(self.keep, dim=-1)
        return torch.zeros_like(importance).scatter(-1, best.indices, self.gate(best.values))

    def flops_per_token(self) -> int:
        """Returns 2 D E."""
        return 2 * self.weight.numel()

    def weights_read(self) -> int:
        """Returns D E."""
        return self.weight.numel()

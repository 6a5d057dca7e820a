"""What every selector is."""

import torch
from torch import nn


class Selector(nn.Module):
    """Maps the FFN's input ``x_BTD`` to ``scores_BTE`` in [0, 1], float32, and says what that costs."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, T, E]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def flops_per_token(self) -> int:
        """Returns what this selector is charged per token: two FLOPs per multiply-add."""
        raise NotImplementedError(f"{type(self).__name__} must say its flops_per_token")

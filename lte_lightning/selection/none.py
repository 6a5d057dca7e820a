"""The floor: no expert ever runs."""

import torch

from lte_lightning.selection.base import Selector


class NoExperts(Selector):
    """Scores every expert 0, so that in hard mode the FFN is its output bias; it is charged nothing.

    A task on which a model adapted like this loses little says little about any way to select experts.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns zeros of shape [B, T, E], float32."""
        return torch.zeros((*x_BTD.shape[:-1], self.experts), dtype=torch.float32, device=x_BTD.device)

    def flops_per_token(self) -> int:
        """Returns 0: nothing is computed."""
        return 0

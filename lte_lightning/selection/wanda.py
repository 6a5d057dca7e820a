"""Wanda: nothing is selected per token, weights are gone for all of them."""

import torch

from lte_lightning.selection.base import FfnShape
from lte_lightning.selection.ranking import Ranking


class Wanda(Ranking):
    """Wanda (Sun et al. 2023), the paper's Table 2: weights with the smallest |weight| * |input| are set to 0.

    Every expert runs, with the weights that `prune` has left in ``core/prune.py``; that says what differs from the
    authors'. Sparsity is the share of the FFN's weights that is gone, and FLOPs are those of the others, as if hardware
    skipped every zero (docs/baselines.md says which does). No oracle.
    """

    density: torch.Tensor

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.register_buffer("density", torch.ones(()))  # of the FFN's weights

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Returns ones of shape [B, T, E], float32."""
        return torch.ones((*given.shape[:-1], self.shape.experts), dtype=torch.float32, device=given.device)

    def used(self, x_BTD: torch.Tensor, scores_BTE: torch.Tensor) -> torch.Tensor:
        """Returns the share of weights that is left, [B, T, 1]."""
        return self.density.float().expand(*scores_BTE.shape[:-1], 1)

    @property
    def reachable(self) -> bool:
        """Whether the sparsity can be met: yes, it is one of weights."""
        return True

    @property
    def calibrates(self) -> bool:
        """Whether training rows are needed: yes, for the norms of the inputs."""
        return True

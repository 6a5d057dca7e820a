"""The floor: no expert ever runs."""

import torch

from lte_lightning.selection.ranking import Ranking
from lte_lightning.selection.registry import register_selector


@register_selector("none")
class NoExperts(Ranking):
    """Scores every expert 0, so that in hard mode the FFN is its output bias; its selection costs nothing.

    If a model adapted without experts loses little on a task, that task cannot tell selectors apart.
    """

    label = "floor"
    no_target = "without experts the sparsity is 1"

    @classmethod
    def name_if_missing(cls, expert_size: int | None) -> str:
        """Returns "": the floor is no method, and a report asks for it by itself."""
        return ""

    @property
    def reachable(self) -> bool:
        """Whether the sparsity can be met: yes, it is 1."""
        return True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns zeros of shape [B, T, E], float32."""
        return torch.zeros((*inputs.shape[:-1], self.shape.experts), dtype=torch.float32, device=inputs.device)

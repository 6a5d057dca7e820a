"""Ranking of experts by activations, without training."""

import torch

from lte_lightning.selection.ranking import Ranking


class Magnitude(Ranking):
    """Ranks experts by the sum of magnitudes of the activations that the selector reads."""

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the sum of |activation| over each expert."""
        return self.magnitude(inputs)

"""What ranks experts by activations that are there already, and needs no training."""

import torch

from lte_lightning.selection.ranking import Ranking


class Magnitude(Ranking):
    """Ranks experts by the sum of the magnitudes of what the selector reads."""

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns the sum of |activation| over each expert."""
        return self.magnitude(given)

"""What was selected over a whole evaluation."""

from collections.abc import Sequence

import torch
from torchmetrics import Metric

from lte_lightning.core.trace import RouterTrace

BINS = 50


class SparsityMeter(Metric):
    """Accumulates how many experts ran, and how scores are distributed, over real tokens; sums over devices.

    Args:
        experts: Number of experts of each layer.
    """

    full_state_update = False

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__()
        self.experts = tuple(experts)
        layers = len(self.experts)
        self.add_state("active_L", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("scores_LH", torch.zeros(layers, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, trace: RouterTrace) -> None:
        """Adds the forward passes that a closed trace has seen."""
        active_L, tokens = trace.active_counts()
        self.active_L += active_L
        self.tokens += tokens
        for layer, scores_NE in enumerate(trace.scores().values()):
            bins = (scores_NE.detach() * BINS).long().clamp_(0, BINS - 1).flatten()
            self.scores_LH[layer] += torch.bincount(bins, minlength=BINS)

    def compute(self) -> list[float]:
        """Returns the share of each layer's neurons that did not run."""
        pairs = [int(self.tokens) * experts for experts in self.experts]
        return [1.0 - int(n) / max(total, 1) for n, total in zip(self.active_L, pairs, strict=True)]

    def overall(self) -> float:
        """Returns the share of all neurons that did not run (all layers have the same expert size)."""
        per_layer = self.compute()
        return sum(s * e for s, e in zip(per_layer, self.experts, strict=True)) / sum(self.experts)

    def histogram(self) -> list[list[int]]:
        """Returns, per layer, how many scores fell in each of 50 equal bins of [0, 1]."""
        return self.scores_LH.tolist()

"""The selection over a whole evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

from lte_lightning.core.routing.sparsity import Counts
from lte_lightning.core.routing.trace import RouterTrace

BINS = 50
UNION_SIZES = tuple(2**k for k in range(8))  # rows of the batches whose union is counted


class SparsityMeter(Metric):
    """Accumulates how many experts ran, and how scores are distributed, over real tokens; sums over devices.

    Args:
        experts: Number of experts of each layer.
    """

    full_state_update = False
    active_L: torch.Tensor
    tokens_L: torch.Tensor
    idle_LK: torch.Tensor
    batches_LK: torch.Tensor
    scores_LH: torch.Tensor

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__()
        self.experts = tuple(experts)
        layers = len(self.experts)
        self.add_state("active_L", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")
        # Per layer, because an encoder and its decoder see different ones.
        self.add_state("tokens_L", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("idle_LK", "batches_LK"):
            self.add_state(name, torch.zeros(layers, len(UNION_SIZES), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("scores_LH", torch.zeros(layers, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, trace: RouterTrace) -> None:
        """Adds the forward passes that a closed trace has seen."""
        counts = trace.counts()
        self.active_L += counts.active_L
        self.tokens_L += counts.tokens_L
        idle_LK, batches_LK = trace.idle_experts(len(UNION_SIZES))
        self.idle_LK += idle_LK
        self.batches_LK += batches_LK
        for layer, scores_NE in enumerate(trace.scores().values()):
            bins = (scores_NE.detach() * BINS).long().clamp_(0, BINS - 1).flatten()
            self.scores_LH[layer] += torch.bincount(bins, minlength=BINS)

    def compute(self) -> dict[str, Any]:
        """Returns the selection of all devices.

        Returns:
            ``sparsity`` and ``sparsity_per_layer``, the share of neurons that did not run (all layers have the same
            expert size; of TEAL and Wanda that of weights), ``union_sparsity``, the share of experts that no token of a
            batch needs, mean over the layers, by the batch's rows (see `RouterTrace.idle_experts`; sizes up to what an
            evaluation's batch holds), and ``score_histogram``, how many scores of each layer fell in each of 50 bins of
            [0, 1].
        """
        counts = Counts(self.active_L, self.tokens_L, self.experts)
        return {
            "sparsity": counts.sparsity(),
            "sparsity_per_layer": counts.per_layer(),
            "union_sparsity": self._union_sparsity(),
            "score_histogram": self.scores_LH.tolist(),
        }

    def _union_sparsity(self) -> dict[str, float]:
        pairs_LK = self.batches_LK * torch.tensor(self.experts, device=self.batches_LK.device).unsqueeze(1)
        shares_K = (self.idle_LK.double() / pairs_LK.clamp(min=1)).mean(0).tolist()
        measured_K = (self.batches_LK > 0).all(0).tolist()
        triples = zip(UNION_SIZES, shares_K, measured_K, strict=True)
        return {str(size): share for size, share, measured in triples if measured}

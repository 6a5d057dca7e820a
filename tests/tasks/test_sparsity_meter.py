import pytest
import torch

from lte_lightning.core.routing.sparsity import Counts
from lte_lightning.tasks.sparsity_meter import BINS, SparsityMeter


class Trace:
    """What the meter asks of a RouterTrace with threshold 0.5."""

    def __init__(self, *scores):
        self.layers = {str(i): torch.tensor(scores_NE) for i, scores_NE in enumerate(scores)}

    def scores(self):
        return self.layers

    def counts(self):
        active = [(scores_NE > 0.5).sum() for scores_NE in self.layers.values()]
        tokens = [len(scores_NE) for scores_NE in self.layers.values()]
        return Counts(torch.stack(active), torch.tensor(tokens), [s.shape[1] for s in self.layers.values()])

    def idle_experts(self, sizes):
        """As if every token were a row of its own, and there were no larger batches."""
        idle = [[int((scores_NE <= 0.5).sum()), *[0] * (sizes - 1)] for scores_NE in self.layers.values()]
        batches = [[len(scores_NE), *[0] * (sizes - 1)] for scores_NE in self.layers.values()]
        return torch.tensor(idle), torch.tensor(batches)


def test_counts_add_up_over_batches_of_different_lengths():
    meter = SparsityMeter([2, 4])
    meter.update(Trace([[0.9, 0.1]], [[0.1, 0.2, 0.3, 0.4]]))
    meter.update(Trace([[0.9, 0.6], [0.9, 0.1]], [[0.9, 0.2, 0.3, 0.4], [0.9, 0.9, 0.3, 0.4]]))
    found = meter.compute()
    assert found["sparsity_per_layer"] == pytest.approx([1 - 4 / 6, 1 - 3 / 12])
    assert found["sparsity"] == pytest.approx(1 - 7 / 18)  # layers weigh by their experts


def test_an_encoder_and_its_decoder_see_different_tokens():
    meter = SparsityMeter([2, 2])
    meter.update(Trace([[0.9, 0.1], [0.1, 0.1], [0.1, 0.1]], [[0.9, 0.9]]))
    found = meter.compute()
    assert found["sparsity_per_layer"] == pytest.approx([1 - 1 / 6, 0.0])
    assert found["sparsity"] == pytest.approx(1 - 3 / 8)  # what did not run, of all tokens' neurons


def test_union_sparsity_is_the_mean_over_layers_of_the_sizes_that_were_there():
    meter = SparsityMeter([2, 4])
    meter.update(Trace([[0.9, 0.1]], [[0.1, 0.2, 0.3, 0.4]]))
    meter.update(Trace([[0.9, 0.6], [0.9, 0.1]], [[0.9, 0.2, 0.3, 0.4], [0.9, 0.9, 0.3, 0.4]]))
    assert meter.compute()["union_sparsity"] == {"1": pytest.approx((2 / 6 + 9 / 12) / 2)}


def test_histogram_has_every_score_once_the_ends_included():
    meter = SparsityMeter([3])
    meter.update(Trace([[0.0, 0.5, 1.0]]))
    (bins,) = meter.compute()["score_histogram"]
    assert [i for i, count in enumerate(bins) if count] == [0, BINS // 2, BINS - 1]
    assert sum(bins) == 3


def test_reset_forgets():
    meter = SparsityMeter([1])
    meter.update(Trace([[0.9]]))
    meter.reset()
    meter.update(Trace([[0.1]]))
    assert meter.compute()["sparsity"] == 1.0

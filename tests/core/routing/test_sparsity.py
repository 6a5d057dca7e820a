import pytest
import torch

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.sparsity import Counts


def test_shares_are_over_all_pairs_and_add_up():
    first = Counts(torch.tensor([3, 1]), torch.tensor([2, 1]), [4, 4])
    second = Counts(torch.tensor([1, 0]), torch.tensor([1, 3]), [4, 4])
    both = first + second
    assert first.sparsity() == pytest.approx(1 - 4 / 12)
    assert both.sparsity() == pytest.approx(1 - 5 / 28)
    assert both.per_layer() == pytest.approx([1 - 4 / 12, 1 - 1 / 16])


def test_without_tokens_nothing_ran():
    none = Counts(torch.tensor([0]), torch.tensor([0]), [4])
    assert (none.sparsity(), none.per_layer()) == (1.0, [1.0])


def test_a_score_on_the_threshold_does_not_run(build, batch):
    """In the output, in the counts, and among the idle experts alike."""
    model = convert(build("bert"), LteConfig(16, "contiguous", router_bias=False), progress=False)
    for ffn in expert_ffns(model).values():
        ffn.selector.weight.data.zero_()  # every score is 0.5
    set_mode(model, "hard")
    ffn, seen = next(iter(expert_ffns(model).values())), []
    ffn.register_forward_hook(lambda ffn, given, out: seen.append(out))
    with torch.no_grad(), RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert bool((trace.scores()["bert.encoder.layer.0.intermediate.dense"] == 0.5).all())
    assert trace.sparsity() == trace.counts().sparsity() == 1.0
    idle_LK, batches_LK = trace.idle_experts(1)
    assert idle_LK.equal(batches_LK * ffn.experts)
    torch.testing.assert_close(seen[0], ffn.down.bias.expand_as(seen[0]))

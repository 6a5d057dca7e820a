import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.target_sparsity import (
    BINS,
    LIMIT,
    clamped_gaps,
    controlled,
    gaps,
    histogram,
    shift_logits,
    shift_to_sparsity,
    wanted_sparsity,
)
from lte_lightning.errors import UserError


@pytest.fixture
def model():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    net = BertForSequenceClassification(config).eval()
    convert(net, LteConfig(expert_size=8, target_sparsity=0.7), progress=False)
    set_mode(net, "hard")
    return net


def trace_of(model, ids_BT, mask_BT):
    with RouterTrace(model, mask_BT) as trace, torch.no_grad():
        model(input_ids=ids_BT, attention_mask=mask_BT)
    return trace


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_few_steps_reach_the_target_in_every_layer(model, target, mode):
    set_mode(model, mode)
    ids_BT, mask_BT = torch.randint(64, (16, 20)), torch.ones(16, 20, dtype=torch.long)
    mask_BT[:, 12:] = 0
    for _ in range(20):
        shift_logits(model, clamped_gaps(model, histogram(model, trace_of(model, ids_BT, mask_BT)), target), 0.7)
    counts = trace_of(model, ids_BT, mask_BT).counts()
    ran_L = counts.active_L / (counts.tokens_L * torch.tensor([ffn.experts for ffn in expert_ffns(model).values()]))
    assert (1 - ran_L).tolist() == pytest.approx([target, target], abs=0.01)


def test_padding_is_not_looked_at(model):
    ids_BT, mask_BT = torch.randint(64, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    mask_BT[:, 6:] = 0
    first = clamped_gaps(model, histogram(model, trace_of(model, ids_BT, mask_BT)), 0.5)
    other_BT = torch.where(mask_BT.bool(), ids_BT, torch.randint(64, (4, 10)))
    assert clamped_gaps(model, histogram(model, trace_of(model, other_BT, mask_BT)), 0.5).tolist() == pytest.approx(
        first.tolist(), abs=1e-5
    )


def test_a_step_is_limited(model):
    for ffn in expert_ffns(model).values():
        ffn.selector.raise_logits(torch.tensor(9.0))
    ids_BT, mask_BT = torch.randint(64, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    assert clamped_gaps(model, histogram(model, trace_of(model, ids_BT, mask_BT)), 0.5).tolist() == [-LIMIT, -LIMIT]


def test_the_goal_rises_in_the_first_quarter():
    assert [wanted_sparsity(0.8, progress) for progress in (0.0, 0.125, 0.25, 0.6, 1.0)] == pytest.approx(
        [0.7, 0.75, 0.8, 0.8, 0.8]
    )


def test_only_a_router_with_a_target_is_controlled(model):
    assert controlled(model)
    plain = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    convert(plain, LteConfig(), progress=False)
    assert not controlled(plain)


# Layers and devices


@pytest.mark.parametrize("layers", ["equal", "free", [0.6, 0.8]])
def test_histograms_of_parts_add_up_exactly(model, layers):
    model.lte_config.sparsity_per_layer = layers
    ids_BT, mask_BT = torch.randint(64, (16, 20)), torch.ones(16, 20, dtype=torch.long)
    mask_BT[3:, 12:] = 0
    whole = histogram(model, trace_of(model, ids_BT, mask_BT))
    parts = [histogram(model, trace_of(model, ids_BT[rows], mask_BT[rows])) for rows in (slice(0, 5), slice(5, 16))]
    summed = gaps(model, sum(parts), 0.7)
    assert whole.sum(1).tolist() == [int(mask_BT.sum()) * 32] * 2
    # to one bin: a batch of another size may round another way in torch's matrix product
    assert (gaps(model, whole, 0.7) - summed).abs().max() <= 32 / BINS
    assert (len(set(summed.tolist())) == 1) == (layers == "free")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0.5, 0.7], r"has the mean 0.6, and target_sparsity is 0.7; set that to 0.6"),
        ([0.7, 1.0], "each must be at least 0 and below 1"),
        ([], "each must be at least 0 and below 1"),
        ("all", "'all'; it is equal, free, or a list"),
    ],
)
def test_layers_that_cannot_be(layers, message):
    with pytest.raises(UserError, match=message):
        LteConfig(target_sparsity=0.7, sparsity_per_layer=layers)


def test_layers_need_a_target_and_their_number():
    with pytest.raises(UserError, match="there is no target_sparsity that LTE's routers are held at"):
        LteConfig(sparsity_per_layer="free")
    with pytest.raises(UserError, match="there is no target_sparsity that LTE's routers are held at"):
        LteConfig(selector="kla", target_sparsity=0.5, sparsity_per_layer="free")
    net = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(UserError, match=r"gives 3 layers, and this BertForSequenceClassification has 2"):
        convert(net, LteConfig(target_sparsity=0.7, sparsity_per_layer=[0.7, 0.7, 0.7]))


def test_rest_says_how_far_it_moved_the_logits(model):
    ids_BT, mask_BT = torch.randint(64, (16, 20)), torch.ones(16, 20, dtype=torch.long)
    batches = [(lambda: model(input_ids=ids_BT, attention_mask=mask_BT), (mask_BT,))]
    before = [ffn.selector.bias.detach().clone() for ffn in expert_ffns(model).values()]
    moved_L = shift_to_sparsity(model, batches, 0.85, rounds=3)
    after = [ffn.selector.bias for ffn in expert_ffns(model).values()]
    assert moved_L.abs().min() > 0
    for old_E, new_E, moved in zip(before, after, moved_L, strict=True):
        assert torch.allclose(new_E - old_E, moved.expand_as(old_E), atol=1e-5)
    assert trace_of(model, ids_BT, mask_BT).sparsity() == pytest.approx(0.85, abs=0.002)

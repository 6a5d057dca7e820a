"""Routers that begin in closed form."""

import pytest
import torch

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.observe import observe
from lte_lightning.core.routing.start import SPREAD, start_routers
from lte_lightning.core.routing.target_sparsity import shift_to_sparsity
from lte_lightning.errors import UserError


@pytest.fixture
def model(build):
    return convert(build("llama", "lm"), LteConfig(expert_size=8, target_sparsity=0.5, grouping="contiguous"))


def batches_of(model, count=6):
    found = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(3, 64, (8, 16)), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
        batch["attention_mask"][:, 12:] = 0
        found.append((lambda batch=batch: model(**batch), (batch["attention_mask"],)))
    return found


def norms_and_logits(model, batches):
    """What each expert gives and what its router says of it, on real tokens: [N, E] of every layer."""
    norms, logits = {}, {}

    def see(ffn, activity):
        outputs_NED = torch.einsum(
            "nes,esd->ned",
            activity.hidden_NF.unflatten(1, (ffn.experts, -1)),
            activity.down_FD.unflatten(0, (ffn.experts, -1)),
        )
        norms.setdefault(id(ffn), []).append(outputs_NED.norm(dim=-1))
        logits.setdefault(id(ffn), []).append(ffn.selector.logits(activity.x_ND))

    for run, masks in batches:
        with torch.no_grad(), observe(model, see, *masks):
            run()
    return [(torch.cat(norms[key]), torch.cat(logits[key])) for key in norms]


def test_logits_follow_the_norms_of_what_experts_give(model):
    batches = batches_of(model)

    def correlations():
        found = []
        for norm_NE, logit_NE in norms_and_logits(model, batches):
            y_NE = norm_NE.log() - norm_NE.log().mean(1, keepdim=True)
            found.append(float(torch.corrcoef(torch.stack([y_NE.flatten(), logit_NE.flatten()]))[0, 1]))
        return found

    before = correlations()
    start_routers(model, batches)
    after = correlations()
    assert max(map(abs, before)) < 0.3 < 0.5 < min(after)
    for _, logit_NE in norms_and_logits(model, batches):
        assert float(logit_NE.std()) == pytest.approx(SPREAD, rel=0.05)


def test_batches_of_unequal_size_and_length_weigh_tokens_alike(model):
    ids_BT = torch.randint(3, 64, (12, 16))
    mask_BT = (torch.arange(16) < torch.randint(2, 17, (12, 1))).long()
    routers = []
    for cuts in ([12], [1, 4, 7]):
        batches = []
        for ids, mask in zip(ids_BT.split(cuts), mask_BT.split(cuts), strict=True):
            batch = {"input_ids": ids[:, : mask.sum(1).max()], "attention_mask": mask[:, : mask.sum(1).max()]}
            batches.append((lambda batch=batch: model(**batch), (batch["attention_mask"],)))
        start_routers(model, batches)
        routers.append([tensor.clone() for ffn in expert_ffns(model).values() for tensor in ffn.selector.linear()])
    for one, several in zip(*routers, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-4)


def test_it_keeps_the_experts_that_give_most(model):
    """At the target, what the chosen experts give is more than what random routers' chosen experts give."""
    batches = batches_of(model)
    kept = []
    for begins in (lambda: None, lambda: start_routers(model, batches)):
        begins()
        set_mode(model, "hard")
        shift_to_sparsity(model, batches, 0.5)
        kept.append(
            [
                float(norm_NE[logit_NE > 0].sum() / norm_NE.sum())
                for norm_NE, logit_NE in norms_and_logits(model, batches)
            ]
        )
    assert all(new > old + 0.05 for old, new in zip(*kept, strict=True)), kept


def test_sums_over_devices_are_those_of_one(model):
    """Each of two devices has half of the rows; what both know is handed over in turn."""
    batches = batches_of(model)
    start_routers(model, batches)
    expected = [parameter.clone() for ffn in expert_ffns(model).values() for parameter in ffn.selector.linear()]
    sent: list[torch.Tensor] = []
    start_routers(model, batches[:3], lambda value: sent.append(value.clone()) or value)
    others = iter(sent)
    start_routers(model, batches[3:], lambda value: value + next(others))
    found = [parameter for ffn in expert_ffns(model).values() for parameter in ffn.selector.linear()]
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two)


def test_padding_counts_for_nothing(model):
    torch.manual_seed(3)
    batches = batches_of(model, 2)
    start_routers(model, batches)
    before = next(iter(expert_ffns(model).values())).selector.weight.clone()
    for run, _ in batches:
        (batch,) = run.__defaults__
        batch["input_ids"][:, 12:] = 5
    start_routers(model, batches)
    torch.testing.assert_close(before, next(iter(expert_ffns(model).values())).selector.weight)


@pytest.mark.parametrize("options", [{"router_bias": False}, {"selector": "kla", "target_sparsity": 0.5}])
def test_it_needs_linear_routers_with_a_bias(options, build):
    model = convert(build("llama", "lm"), LteConfig(expert_size=8, grouping="contiguous", **options))
    with pytest.raises(UserError, match="closed-form needs linear routers with a bias"):
        start_routers(model, batches_of(model, 1))


@pytest.mark.parametrize("layers", ["equal", "free", [0.3, 0.7]])
def test_a_model_rests_at_its_target(layers, build):
    options = {"target_sparsity": 0.5, "sparsity_per_layer": layers, "router_margin": 0.1, "router_scale": 2.0}
    model = convert(build("llama", "lm"), LteConfig(expert_size=4, grouping="contiguous", **options))
    batches = batches_of(model)
    with torch.no_grad():
        next(iter(expert_ffns(model).values())).selector.bias.add_(3.0)  # layers lie apart
    set_mode(model, "hard")
    shift_to_sparsity(model, batches, 0.5)
    counts = None
    for run, masks in batches:
        with torch.no_grad(), RouterTrace(model, *masks) as trace:
            run()
        counts = trace.counts() if counts is None else counts + trace.counts()
    assert counts.sparsity() == pytest.approx(0.5, abs=0.005)
    per_layer = counts.per_layer()
    if layers == "free":
        assert per_layer[1] - per_layer[0] > 0.2  # the shift that the layers have in common leaves them apart
    else:
        assert per_layer == pytest.approx([0.5, 0.5] if layers == "equal" else layers, abs=0.005)

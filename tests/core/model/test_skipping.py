"""Skipping experts in training: gradients are those of masking in every family; modules compute what it cannot."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lte_lightning import LteConfig, convert, set_mode
from lte_lightning.core.model import prepared
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import find_layers


@pytest.fixture
def skipped(monkeypatch):
    """How often `run_skipping` ran; it is taken for faster, however small a model is."""
    calls = []
    run = prepared.Prepared.run
    monkeypatch.setattr(prepared, "skips", lambda mask_NE, dtype: True)
    monkeypatch.setattr(
        prepared.Prepared, "run", lambda self, *args: (calls.append(self.skipping), run(self, *args))[1]
    )
    return calls


@pytest.fixture
def sparse(build, scatter):
    """`sparse(family)`: in hard mode as the expert stage trains it, about half of its experts off."""

    def make(family="llama", head="lm", dropout=0.0):
        model = scatter(convert(build(family, head, dropout), LteConfig(expert_size=16), progress=False)).train()
        set_mode(model, "hard")
        for parameter in selector_parameters(model):
            parameter.requires_grad_(False)
        return model

    return make


def step(model, batch, skips, run=None):
    """Returns the logits and every gradient of a step."""
    for ffn in expert_ffns(model).values():
        ffn.skips_in_training = skips
    model.zero_grad()
    logits = (run or model)(**batch).logits
    logits.float().square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    largest = max(value.float().norm() for value in expected.values())  # some gradients are zero but for rounding
    for name, value in expected.items():
        apart = (actual[name].float() - value.float()).norm()
        assert apart <= tolerance * (value.float().norm() + 0.01 * largest), f"{name}: {apart}"


# Those with dropout between their projections, which is on in training
MASKED = {"modernbert", "t5", "t5-gated", "bart"}


def test_gradients_of_every_family(family_and_head, sparse, batch, skipped):
    model = sparse(*family_and_head)
    expected = step(model, batch, skips=False)
    assert not skipped
    assert_same(step(model, batch, skips=True), expected)
    assert len(skipped) == (0 if family_and_head[0] in MASKED else len(expert_ffns(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(sparse, batch, skipped, dtype):
    model = sparse()
    with torch.no_grad():
        for ffn in expert_ffns(model).values():  # rounding is not to change a choice
            weight_ED, bias_E = ffn.selector.linear()
            weight_ED.zero_()
            bias_E.copy_(torch.arange(ffn.experts) % 2 - 0.5)
    with torch.autocast("cpu", dtype):
        expected, actual = (step(model, batch, skips) for skips in (False, True))
    assert len(skipped) == 2
    assert_same(actual, expected, tolerance=0.05)


def test_gradient_checkpointing(sparse, batch, skipped):
    model = sparse()
    expected = step(model, batch, skips=False)
    for layer in find_layers(model):
        forward = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False)
    assert_same(step(model, batch, skips=True), expected)
    assert len(skipped) == 4  # each of two layers, and again for its gradients


def test_validation_skips_with_the_same_bits(sparse, batch, skipped):
    model = sparse()
    trained = step(model, batch, skips=True)["logits"]
    with torch.no_grad():
        assert model.eval()(**batch).logits.equal(trained)
    assert len(skipped) == 4


@pytest.mark.parametrize("change", ["hook", "dropout", "trained routers", "soft"])
def test_modules_compute_what_it_cannot(sparse, batch, skipped, change):
    model = sparse()
    for ffn in expert_ffns(model).values():
        if change == "hook":
            ffn.up.register_forward_hook(lambda module, args, out: 2 * out)
        elif change == "dropout":
            ffn.dropout = nn.Dropout(0.0)
        elif change == "soft":
            ffn.mode = "soft"
        else:
            ffn.straight_through = True
            ffn.selector.requires_grad_(True)
    expected = step(model, batch, skips=False)
    assert_same(step(model, batch, skips=True), expected, tolerance=0.0)
    assert not skipped


@pytest.mark.parametrize("pre", [False, True], ids=["full", "pre"])
def test_backward_hooks_of_projections_run(pre, sparse, batch, skipped):
    model = sparse()
    before = step(model, batch, skips=True)
    assert skipped
    for ffn in expert_ffns(model).values():
        if pre:
            ffn.down.register_full_backward_pre_hook(lambda module, gradients: (2 * gradients[0],))
        else:
            ffn.down.register_full_backward_hook(lambda module, gradients, outputs: (2 * gradients[0],))
    changed = step(model, batch, skips=True)
    assert_same(changed, step(model, batch, skips=False))
    name = next(name for name in before if name.endswith("up.weight"))
    assert (changed[name] - before[name]).norm() > 0.1 * before[name].norm()

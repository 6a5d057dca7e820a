"""A projection that holds gate and up: one in the plain model, two that share its memory in the converted one."""

import copy

import pytest
import torch
from torch import nn

from lte_lightning import LteConfig, convert, restore
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.fused import halves, put_together, take_apart
from lte_lightning.core.model.parts import find_layers, get_child
from lte_lightning.core.model.swap import plain

FUSED = {"phi3": "mlp.gate_up_proj", "modernbert": "mlp.Wi"}


@pytest.fixture(params=FUSED)
def fused_family(request):
    return request.param


@pytest.fixture
def model(build, fused_family):
    return build(fused_family)


def projections(model, family):
    return [get_child(layer, FUSED[family]) for layer in find_layers(model)]


def converted(model):
    return convert(model, LteConfig(16, "contiguous"), progress=False)


def addresses(model):
    return [[p.weight.data_ptr() for p in (ffn.gate, ffn.up)] for ffn in expert_ffns(model).values()]


def test_the_first_half_is_the_gate(model, fused_family):
    weights = [fused.weight.clone() for fused in projections(model, fused_family)]
    for weight, ffn in zip(weights, expert_ffns(converted(model)).values(), strict=True):
        assert torch.cat([ffn.gate.weight, ffn.up.weight]).equal(weight)


def test_the_weights_lie_in_memory_once(model, fused_family):
    fused = projections(model, fused_family)
    before = [each.weight.data_ptr() for each in fused]
    distance = fused[0].weight.nbytes // 2
    size = sum(p.numel() for p in model.parameters())
    converted(model)
    assert addresses(model) == [[start, start + distance] for start in before]
    assert [each.weight for each in fused] == [None, None]
    routers = sum(p.numel() for ffn in expert_ffns(model).values() for p in ffn.selector.parameters())
    assert sum(p.numel() for p in model.parameters()) == size + routers
    with plain(model):
        assert [each.weight.data_ptr() for each in fused] == before
    assert addresses(model) == [[start, start + distance] for start in before]
    restore(model)
    assert [each.weight.data_ptr() for each in fused] == before


def test_another_type_gives_memory_of_its_own_that_is_shared_again_after_the_first_save(model, fused_family):
    fused = projections(model, fused_family)
    expected = [each.weight.to(torch.bfloat16) for each in fused]
    converted(model).to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    with plain(model):
        assert all(each.weight.equal(weight) for each, weight in zip(fused, expected, strict=True))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for gate, up in addresses(model):
        assert up - gate == expected[0].nbytes // 2
    assert all(parameters[name] is p for name, p in model.named_parameters()), "an optimizer would lose them"


def test_a_copy_is_independent(model, fused_family):
    other = copy.deepcopy(converted(model))
    with torch.no_grad():
        for ffn in expert_ffns(other).values():
            ffn.gate.weight.add_(1.0)
    restore(model)
    restore(other)
    pairs = zip(projections(model, fused_family), projections(other, fused_family), strict=True)
    for mine, theirs in pairs:
        assert theirs.weight[:96].equal(mine.weight[:96] + 1.0)
        assert theirs.weight[96:].equal(mine.weight[96:])


def test_frozen_stays_frozen(model, fused_family):
    model.requires_grad_(False)
    converted(model)
    assert not any(p.requires_grad for ffn in expert_ffns(model).values() for p in (*ffn.gate.parameters(),))
    assert not any(p.requires_grad for p in restore(model).parameters())


def test_a_step_on_one_half_leaves_the_backward_pass_of_the_other_alone():
    fused = nn.Linear(4, 6)
    gate, up = halves(fused)
    take_apart(fused, gate, up)
    x = torch.randn(2, 4, requires_grad=True)
    out = gate(x)
    with torch.no_grad():
        up.weight.add_(1.0)
    out.sum().backward()
    put_together(fused, gate, up)
    assert fused.weight[3:].equal(up.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_halves_take_nothing_from_the_global_generator(bias):
    fused, state = nn.Linear(4, 6, bias), torch.get_rng_state()
    gate, up = halves(fused)
    assert torch.get_rng_state().equal(state)
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.cat([gate(x), up(x)], -1), fused(x))

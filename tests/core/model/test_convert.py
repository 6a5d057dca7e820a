import re

import pytest
import torch
from torch import nn

from lte_lightning import LteConfig, convert, restore, set_mode
from lte_lightning.core.model.convert import group_experts, selector_parameters
from lte_lightning.core.model.experts import ExpertFfn, expert_ffns
from lte_lightning.core.model.families import FAMILIES, UnsupportedModelError, find_row
from lte_lightning.core.model.parts import find_layers, find_parts, set_child
from lte_lightning.core.model.swap import plain
from lte_lightning.errors import UserError
from lte_lightning.selection import SELECTORS

SIZE = 16
CONTIGUOUS = LteConfig(SIZE, "contiguous")


def converted(model, **kwargs):
    return convert(model, LteConfig(**{"expert_size": SIZE, "grouping": "contiguous", **kwargs}), progress=False)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def snapshot(model):
    """Everything that a failed conversion could have changed."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
        hasattr(model, "lte_config"),
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert list(before[1]) == list(after[1])
    for key, value in before[1].items():
        torch.testing.assert_close(after[1][key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert before[2] == after[2]


def test_every_row_of_the_table_has_a_tiny_model(tiny_configs):
    assert {config.model_type for config in tiny_configs.values()} == set(FAMILIES)


def assert_close(result, expected, tolerance=4e-6):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def assert_equal(model, result, expected):
    """Bit for bit, unless a fused projection became two: a product of other shape may round otherwise."""
    if find_row(model.config.model_type).fused:
        assert_close(result, expected)
    else:
        assert result.equal(expected)


def test_dense_equals_the_original_bit_for_bit(build, batch, family_and_head):
    expected = logits(build(*family_and_head), batch)
    model = converted(build(*family_and_head))
    assert len(expert_ffns(model)) == 2
    assert_equal(model, logits(model, batch), expected)


@pytest.mark.parametrize("grouping", ["kmeans", "random"])
def test_dense_equals_the_original_but_for_the_order_of_the_sum(build, batch, family, grouping):
    plain_model, model = build(family), converted(build(family), grouping=grouping)
    for original, ffn in zip(all_parts(plain_model), expert_ffns(model).values(), strict=True):
        assert not original.up.weight.equal(ffn.up.weight), "nothing was permuted"
    assert_close(logits(model, batch), logits(plain_model, batch))


def all_parts(model):
    return [find_parts(layer, find_row(model.config.model_type)) for layer in find_layers(model)]


def test_dropout_falls_as_in_the_original(build, batch, family):
    results = []
    for model in (build(family).train(), converted(build(family)).train()):
        torch.manual_seed(3)
        results.append(logits(model, batch))
    assert_equal(model, results[1], results[0])
    assert not results[0].equal(logits(build(family), batch))


def test_soft_with_scores_of_one_equals_dense(build, batch, family):
    model = converted(build(family), grouping="kmeans", router_margin=50.0)
    expected = logits(model, batch)
    set_mode(model, "soft")
    assert logits(model, batch).equal(expected)


@pytest.mark.parametrize("grouping", ["kmeans", "contiguous"])
def test_hard_with_all_experts_on_equals_dense(build, batch, family, grouping):
    model = converted(build(family), grouping=grouping)
    for selector in (ffn.selector for ffn in expert_ffns(model).values()):
        selector.weight.data.mul_(0.1)  # hidden states of these models have no unit root mean square
    expected = logits(model, batch)
    set_mode(model, "hard")
    scores = []
    for ffn in expert_ffns(model).values():
        ffn.selector.register_forward_hook(lambda module, args, output: scores.append(output))
    assert logits(model, batch).equal(expected)
    assert len(scores) == 2
    assert min(float(score.min()) for score in scores) > 0.5


def naive_expert_ffn(ffn, x_TD, hard):
    """Equations 1 to 3 in float64, a loop over experts."""

    def matrix(projection):
        weight = projection.weight.double()
        return weight if isinstance(projection, nn.Linear) else weight.T

    def bias(projection):
        return 0.0 if projection.bias is None else projection.bias.double()

    def project(projection, neurons):
        shift = bias(projection)
        return x_TD @ matrix(projection)[neurons].T + (shift if isinstance(shift, float) else shift[neurons])

    x_TD = x_TD.double()
    out_TD = torch.zeros_like(x_TD) + bias(ffn.down)
    for expert in range(ffn.experts):
        neurons = slice(expert * SIZE, (expert + 1) * SIZE)
        if ffn.gate is None:
            hidden_TS = ffn.activation(project(ffn.up, neurons))
        else:
            hidden_TS = ffn.activation(project(ffn.gate, neurons)) * project(ffn.up, neurons)
        score_T = torch.sigmoid(x_TD @ ffn.selector.weight[expert].double() + ffn.selector.bias[expert].double())
        factor_T = (score_T > ffn.threshold).double() if hard else score_T
        out_TD += factor_T[:, None] * (hidden_TS @ matrix(ffn.down)[:, neurons].T)
    return out_TD


@pytest.mark.parametrize("threshold", [0.5, 0.6])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_modes_equal_the_equations(build, batch, row_family, scatter, mode, threshold):
    model = scatter(converted(build(row_family), grouping="kmeans", threshold=threshold))
    set_mode(model, mode)
    seen = []
    for ffn in expert_ffns(model).values():
        ffn.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
    logits(model, batch)
    assert len(seen) == 2
    for ffn, x_BTD, out_BTD in seen:
        running = (ffn.selector(x_BTD) > threshold).float().mean()
        assert 0.05 < running < 0.95, "the test must see experts on both sides"
        with torch.no_grad():
            expected = naive_expert_ffn(ffn, x_BTD.flatten(0, -2), hard=mode == "hard")
        torch.testing.assert_close(out_BTD.flatten(0, -2).double(), expected, rtol=1e-5, atol=1e-5)


def test_without_experts_only_the_output_bias_is_left(build, batch, row_family):
    model = converted(build(row_family), selector="none")
    set_mode(model, "hard")
    outputs = []
    for ffn in expert_ffns(model).values():
        ffn.register_forward_hook(lambda module, args, output: outputs.append((module.down.bias, output)))
    logits(model, batch)
    for bias, output in outputs:
        assert output.equal(torch.zeros_like(output) if bias is None else bias.expand_as(output))


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_autocast(build, batch, row_family, mode):
    model = converted(build(row_family), router_margin=50.0)
    set_mode(model, mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits(model, batch), logits(build(row_family), batch), 0.02)


@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, batch, row_family, scatter, mode, dtype):
    model = scatter(converted(build(row_family), grouping="random"))
    set_mode(model, mode)
    expected = logits(model, batch)
    result = logits(model.to(dtype), batch)
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    if mode != "hard":  # there, rounding may move a score across the threshold
        assert_close(result.float(), expected, 0.1)


def test_gradients_reach_the_routers_in_soft_mode(build, batch, row_family):
    model = converted(build(row_family))
    set_mode(model, "soft")
    model(**batch).logits.square().sum().backward()
    for parameter in selector_parameters(model):
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is not None for ffn in expert_ffns(model).values() for parameter in ffn.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_no_gradient_reaches_the_routers_in_hard_mode(build, batch, row_family, scatter, frozen):
    model = scatter(converted(build(row_family)))
    set_mode(model, "hard")
    for parameter in selector_parameters(model):
        parameter.requires_grad_(not frozen)
    model(**batch).logits.square().sum().backward()
    assert all(parameter.grad is None for parameter in selector_parameters(model))
    assert all(ffn.up.weight.grad.abs().max() > 0 for ffn in expert_ffns(model).values())


@pytest.mark.parametrize("grouping", ["kmeans", "contiguous"])
def test_restore_gives_the_plain_model(build, batch, family_and_head, grouping):
    original = build(*family_and_head)
    model = converted(build(*family_and_head), grouping=grouping)
    set_mode(model, "hard")
    restore(model)
    before, after = snapshot(original), snapshot(model)
    assert before[0] == after[0]
    assert list(before[1]) == list(after[1])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert not expert_ffns(model)
    assert not hasattr(model, "lte_config")
    if grouping == "contiguous":
        assert_same(before, after)
    assert_close(logits(model, batch), logits(original, batch))


def test_restore_keeps_what_was_trained(build, batch, labels, family):
    original = build(family)
    model = converted(build(family), grouping="kmeans").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for mode in ("dense", "soft", "hard"):
        set_mode(model, mode)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    set_mode(model, "dense")
    expected = logits(model.eval(), batch)
    assert not expected.isclose(logits(original, batch), atol=1e-3).all()
    assert_equal(model, logits(restore(model), batch), expected)


def test_plain_is_for_a_while(build, batch, row_family, scatter):
    model = scatter(converted(build(row_family), grouping="random"))
    set_mode(model, "hard")
    before, hard = snapshot(model), logits(model, batch)
    with plain(model):
        assert not expert_ffns(model)
        assert list(model.state_dict()) == list(build(row_family).state_dict())
    assert_same(before, snapshot(model))
    with pytest.raises(KeyError), plain(model):
        raise KeyError
    assert_same(before, snapshot(model))
    assert logits(model, batch).equal(hard)


def test_a_restored_model_converts_again(build, batch, row_family):
    model = converted(restore(converted(build(row_family), grouping="random")), grouping="kmeans")
    assert_close(logits(model, batch), logits(build(row_family), batch))


def test_grouping_is_reported(build):
    model = converted(build("bert"))
    assert group_experts(model, progress=False) == []
    model.lte_config = LteConfig(SIZE, "kmeans")
    groupings = group_experts(model, progress=False)
    assert len(groupings) == 2
    assert all(grouping.inertia < grouping.random_inertia for grouping in groupings)


def test_seed_decides_routers_and_grouping(build):
    models = [converted(build("gpt2"), grouping="random", seed=seed) for seed in (4, 4, 5)]
    first, second, other = (dict(model.named_parameters()) for model in models)
    assert all(value.equal(second[key]) for key, value in first.items())
    changed = {key for key, value in first.items() if not value.equal(other[key])}
    assert any(key.endswith("selector.weight") for key in changed)
    assert any(key.endswith("up.weight") for key in changed)


def test_conversion_leaves_the_global_generator_alone(build):
    model, state = build("bert"), torch.get_rng_state()
    converted(model, grouping="kmeans")
    assert torch.get_rng_state().equal(state)


class Quantised(nn.Linear):
    """Stands for weights that cannot be permuted."""


def spoil_the_last_layer(model, kind):
    set_child(find_layers(model)[-1], getattr(all_parts(model)[-1].row, kind), Quantised(32, 96))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"expert_size": 36}, r"expert_size=36 .* 96 .*: 32, 24, 48"),
        ({"selector": "psychic"}, r"unknown selector 'psychic'; there are router, cats, "),
        ({"grouping": "kmean"}, r"'kmean'.*kmeans, coactivation, use, random, contiguous"),
        ({"grouping": "coactivation"}, r"needs what the neurons do on training rows: convert\(\.\.\., group=False\)"),
    ],
)
def test_bad_settings_change_nothing(build, row_family, kwargs, message):
    model = build(row_family)
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        converted(model, **kwargs)
    assert_same(before, snapshot(model))


OUT_OF_REACH = [
    ("dejavu", 0.92, "none", "would equal the floor, selector 'none'"),
    ("kla", 0.92, "none", "would equal the floor, selector 'none'"),
    ("moefication", 0.92, "none", "would equal the floor, selector 'none'"),
    ("narrow", 0.92, "none", "would equal the floor, selector 'none'"),
    ("random", 0.92, "none", "would equal the floor, selector 'none'"),
    ("sigmamoe", 0.92, "none", "would have nothing to learn"),
    ("softmax", 0.92, "none", "would have nothing to learn"),
    ("d2dmoe", 0.84, "less than one", "runs at least the best of each token"),
]


@pytest.mark.parametrize(("selector", "target", "kept", "so"), OUT_OF_REACH)
def test_a_sparsity_that_leaves_no_expert_changes_nothing(selector, target, kept, so, build):
    model = build("bert")
    before = snapshot(model)
    message = f"target_sparsity {target} leaves {kept} of 6 experts running, and selector '{selector}' {so}; "
    with pytest.raises(UserError, match=re.escape(message + "set it to at most 0.833, or lower expert_size (now 16)")):
        converted(model, selector=selector, target_sparsity=target)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("selector", "target"),
    [
        *[(selector, 0.833) for selector, *_ in OUT_OF_REACH],  # what the message says
        *[(selector, 0.91) for selector, *_ in OUT_OF_REACH if selector != "d2dmoe"],  # one of six, by rounding
        ("d2dmoe", 5 / 6),
        ("cats", 0.99),  # none for most tokens
        ("wanda", 0.99),  # all, with few weights
        ("none", None),
    ],
)
def test_a_sparsity_that_can_be_met_or_nearly_is_taken(selector, target, build):
    assert len(expert_ffns(converted(build("bert"), selector=selector, target_sparsity=target))) == 2


@pytest.mark.parametrize("part", ["up", "down"])
def test_projections_of_other_types_are_refused(build, row_family, part):
    model = build(row_family)
    spoil_the_last_layer(model, part)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"is a Quantised; .* before quantising"):
        converted(model)
    assert_same(before, snapshot(model))


def test_missing_part_is_named(build):
    model = build("bert")
    del find_layers(model)[1].output.dense
    with pytest.raises(UnsupportedModelError, match=r"BertLayer has no 'output.dense'"):
        converted(model)
    assert not expert_ffns(model)


def test_weights_that_are_not_finite_change_nothing(build, row_family):
    model = build(row_family)
    parts = all_parts(model)[1]
    (parts.gate or parts.up).weight.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(UserError, match="NaN or infinite"):
        converted(model, grouping="kmeans")
    assert_same(before, snapshot(model))


def test_converting_twice_is_refused(build, row_family):
    model = converted(build(row_family))
    before = snapshot(model)
    with pytest.raises(UserError, match=r"has expert FFNs already; restore\(\) it first"):
        converted(model)
    assert_same(before, snapshot(model))


def test_what_needs_a_converted_model_says_so(build):
    model = build("bert")
    for action in (restore, lambda model: set_mode(model, "soft"), lambda model: plain(model).__enter__()):
        with pytest.raises(UserError, match=r"has no expert FFNs; convert\(\) it first"):
            action(model)


def test_unknown_mode_changes_nothing(build):
    model = converted(build("bert"))
    with pytest.raises(UserError, match="unknown mode 'sof'; there are dense, soft, hard"):
        set_mode(model, "sof")
    assert {ffn.mode for ffn in expert_ffns(model).values()} == {"dense"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": 0.0}, r"threshold is 0.0; .*\(0, 1\)"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'; it must be a number"),
        ({"threshold": None}, "threshold is None; it must be a number"),
        ({"threshold": True}, "threshold is True; it must be a number"),
        ({"target_sparsity": "0.8"}, "target_sparsity is '0.8'; it must be a number"),
        ({"router_bias": "no"}, "router_bias is 'no'; it must be true or false"),
        ({"expert_size": 0}, "expert_size is 0; it must be a whole number from 1 on"),
        ({"router_scale": 0.0}, "router_scale is 0.0; it must be positive"),
    ],
)
def test_config_is_checked(kwargs, message):
    with pytest.raises(UserError, match=message):
        LteConfig(**kwargs)


def test_an_expert_ffn_describes_itself(build):
    ffn = next(iter(expert_ffns(converted(build("bert"))).values()))
    assert isinstance(ffn, ExpertFfn)
    assert (ffn.width, ffn.neurons, ffn.experts) == (32, 96, 6)
    assert "6 experts x 16 neurons, mode=dense, threshold=0.5" in repr(ffn)


def test_weights_can_be_drawn_anew(build, row_family):
    """GPT-2 looks for its down projection by the name that it had, and scales it by its depth."""
    model = converted(build(row_family))
    before = {name: p.clone() for name, p in model.named_parameters() if ".down." in name}
    for each in (*model.modules(), *model.parameters()):
        if hasattr(each, "_is_hf_initialized"):
            del each._is_hf_initialized
    model.init_weights()
    assert not any(p.equal(before[name]) for name, p in model.named_parameters() if name in before)
    if row_family == "gpt2":
        for ffn in expert_ffns(model).values():
            assert ffn.down.weight.std().item() == pytest.approx(model.config.initializer_range / 2, rel=0.1)
            assert ffn.up.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name not in ("none",)])
def test_another_default_device_changes_nothing(build, selector):
    """Lightning loads models while torch's default device is a GPU; meta stands in for it."""
    single = SELECTORS[selector].needs_expert_size
    target = None if SELECTORS[selector].no_target or SELECTORS[selector].optional_target else 0.5
    config = LteConfig(expert_size=single or SIZE, selector=selector, target_sparsity=target, grouping="kmeans")
    expected = convert(build("llama"), config, progress=False)
    model = build("llama")
    with torch.device("meta"):
        convert(model, config, progress=False)
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not state[name].equal(wanted[name])] == []

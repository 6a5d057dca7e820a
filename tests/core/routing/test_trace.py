import gc
import weakref

import pytest
import torch
from transformers import BartForCausalLM, T5EncoderModel

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError

SIZE, TAU, EPSILON = 16, 0.5, 0.01


@pytest.fixture
def routed(build, scatter):
    """`routed(family, mode)`: a converted model whose scores lie on both sides of the threshold."""

    def routed(family="bert", mode="soft", **kwargs):
        model = scatter(convert(build(family, **kwargs), LteConfig(SIZE, "random"), progress=False))
        set_mode(model, mode)
        return model

    return routed


def figures(model, batch, *masks):
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)
    return float(trace.efficiency_loss()), float(trace.separability_loss()), trace.sparsity()


def changed_where_padded(ids, mask):
    return torch.where(mask.bool(), ids, (ids + 7) % 60 + 3)


def longer(tensor, pad=0):
    return torch.nn.functional.pad(tensor, (0, 9), value=pad)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_padding_changes_nothing(routed, batch, masks, family, mode):
    model = routed(family, mode)
    expected = figures(model, batch, *masks)
    for prefix in {key.removesuffix("attention_mask") for key in batch if key.endswith("attention_mask")}:
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        other = batch | {f"{prefix}input_ids": changed_where_padded(ids, mask)}
        assert not other[f"{prefix}input_ids"].equal(ids)
        assert figures(model, other, *masks) == pytest.approx(expected, abs=1e-6)

        padded = {f"{prefix}input_ids": longer(ids, model.config.pad_token_id), f"{prefix}attention_mask": longer(mask)}
        longer_masks = [longer(each) if each is mask else each for each in masks]
        assert figures(model, batch | padded, *longer_masks) == pytest.approx(expected, rel=1e-6, abs=1e-6)

        all_real = [torch.ones_like(each) if each is mask else each for each in masks]
        assert figures(model, batch, *all_real) != pytest.approx(expected, abs=1e-4), "padding would have counted"


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_equals_the_equations(routed, batch, masks, row_family, mode):
    model = routed(row_family, mode)
    layers = []
    for ffn in expert_ffns(model).values():
        ffn.selector.register_forward_hook(lambda module, args, scores: layers.append(scores.double()))
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)

    efficiency = separability = running = 0.0
    experts = layers[0].shape[-1]
    for layer, scores in enumerate(layers):
        mask = masks[layer if len(masks) == 2 else 0]  # one layer in the encoder, and one in the decoder
        tokens = [(b, t) for b in range(3) for t in range(7) if mask[b, t]]
        for b, t in tokens:
            for score in scores.view(3, 7, experts)[b, t].tolist():
                efficiency += score**2
                separability += 1 / ((score - TAU) ** 2 + EPSILON)
                running += score > TAU
    pairs = len(layers) * len(tokens) * experts
    assert len(tokens) == 14
    assert 0.1 < running / pairs < 0.9
    assert float(trace.efficiency_loss()) == pytest.approx(efficiency / pairs, rel=1e-5)
    assert float(trace.separability_loss()) == pytest.approx(separability / pairs, rel=1e-5)
    assert trace.sparsity() == pytest.approx(1 - running / pairs, abs=1e-12)
    active_L, seen = trace.active_counts()
    assert (active_L.shape, int(active_L.sum()), seen) == ((2,), running, 14)
    assert [tuple(scores.shape) for scores in trace.scores().values()] == [(14, experts)] * 2
    assert list(trace.scores()) == list(expert_ffns(model))


def test_without_a_mask_all_tokens_are_real(routed, batch):
    model = routed()
    with RouterTrace(model) as bare:
        model(**batch)
    with RouterTrace(model, torch.ones(3, 7)) as ones:
        model(**batch)
    for first, second in zip(bare.scores().values(), ones.scores().values(), strict=True):
        assert first.equal(second)


def test_several_forwards_add_up(routed, batch):
    model = routed()
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
        once = trace.scores()
        model(**batch)
    for first, both in zip(once.values(), trace.scores().values(), strict=True):
        assert both.equal(torch.cat([first, first]))


def test_the_separability_loss_uses_the_models_threshold(build, batch):
    model = convert(build(), LteConfig(SIZE, "contiguous", threshold=0.3), progress=False)
    set_mode(model, "soft")
    with RouterTrace(model) as trace:
        model(**batch)
    expected = torch.stack(list(trace.scores().values())).sub(0.3).square().add(0.5).reciprocal().mean()
    torch.testing.assert_close(trace.separability_loss(epsilon=0.5), expected)


def test_a_mask_of_another_shape(routed, batch):
    model = routed()
    with (
        pytest.raises(UserError, match=r"mask has shape \(3, 6\), the tokens \(3, 7\)"),
        RouterTrace(model, batch["attention_mask"][:, :6]),
    ):
        model(**batch)
    assert all(ffn.recorder is None for ffn in expert_ffns(model).values())


@pytest.mark.parametrize("which", [0, 1])
def test_a_mask_of_another_shape_in_either_stack(routed, batch, masks, seq2seq_family, which):
    model = routed(seq2seq_family)
    wrong = [mask[:, :6] if i == which else mask for i, mask in enumerate(masks)]
    with (
        pytest.raises(UserError, match=rf"the {('token', 'decoder')[which]} mask has shape \(3, 6\), .* \(3, 7\)"),
        RouterTrace(model, *wrong),
    ):
        model(**batch)
    assert all(ffn.recorder is None for ffn in expert_ffns(model).values())


def test_a_mask_for_each_stack(routed, batch, masks, seq2seq_family):
    model = routed(seq2seq_family)
    model_class = type(model).__name__
    for given in ({"token_mask_BT": masks[0]}, {"decoder_mask_BT": masks[1]}):
        with pytest.raises(UserError, match=rf"{model_class} has an encoder and a decoder; give both .* or neither"):
            RouterTrace(model, **given)
    with RouterTrace(model) as bare:
        model(**batch)
    assert [len(scores) for scores in bare.scores().values()] == [21, 21]
    with RouterTrace(model, masks[0], torch.zeros_like(masks[1])) as trace:
        model(**batch)
    with pytest.raises(UserError, match="there is no real token: the decoder mask is all zeros"):
        trace.sparsity()


def test_stacks_of_different_length(routed, batch, masks, seq2seq_family):
    model = routed(seq2seq_family, "hard")
    short = batch | {key: value[:, :4] for key, value in batch.items() if key.startswith("decoder")}
    with torch.no_grad(), RouterTrace(model, masks[0], masks[1][:, :4]) as trace:
        model(**short)
    encoder, decoder = trace.scores().values()
    assert (len(encoder), len(decoder)) == (14, 2 + 4 + 4)
    active = (encoder > TAU).sum() + (decoder > TAU).sum()
    assert trace.sparsity() == pytest.approx(1 - int(active) / (24 * 6), abs=1e-12)


def test_a_decoder_mask_needs_an_encoder(routed, batch):
    with pytest.raises(UserError, match="GPT2ForSequenceClassification has one stack"):
        RouterTrace(routed("gpt2"), batch["attention_mask"], batch["attention_mask"])


@pytest.mark.parametrize(("model_class", "family"), [(T5EncoderModel, "t5-gated"), (BartForCausalLM, "bart")])
def test_half_of_an_encoder_decoder_has_one_stack(build, scatter, batch, model_class, family):
    model = scatter(convert(model_class(build(family).config).eval(), LteConfig(SIZE, "random"), progress=False))
    assert len(expert_ffns(model)) == 1
    set_mode(model, "soft")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert [len(scores) for scores in trace.scores().values()] == [14]


def test_tokens_in_one_list(routed, batch):
    model, seen = routed("opt"), []
    next(iter(expert_ffns(model).values())).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert seen == [(21, 32)]
    assert [len(scores) for scores in trace.scores().values()] == [14, 14]
    with (
        pytest.raises(UserError, match=r"the token mask has shape \(3, 6\), the tokens \(21,\)"),
        RouterTrace(model, batch["attention_mask"][:, :6]),
    ):
        model(**batch)


def test_no_forward_inside(routed, batch):
    model = routed()
    with RouterTrace(model) as trace:
        pass
    model(**batch)
    for read in (trace.scores, trace.efficiency_loss, trace.separability_loss, trace.sparsity):
        with pytest.raises(RuntimeError, match=r"recorded no scores \(2 of 2 layers\)"):
            read()


def test_dense_mode_has_no_scores(routed, batch):
    model = routed(mode="dense")
    with RouterTrace(model) as trace:
        model(**batch)
    with pytest.raises(RuntimeError, match="in mode 'soft' or 'hard'"):
        trace.scores()


def test_a_model_that_was_not_converted(build):
    with pytest.raises(UserError, match=r"convert\(\) it first"):
        RouterTrace(build())


def test_nested_traces_are_refused_and_the_outer_one_goes_on(routed, batch):
    model = routed()
    with RouterTrace(model) as outer:
        with pytest.raises(RuntimeError, match="already traced"), RouterTrace(model):
            pass
        model(**batch)
    assert len(outer.scores()) == 2


def test_nothing_but_padding(routed, batch):
    model = routed()
    with RouterTrace(model, torch.zeros(3, 7)) as trace:
        model(**batch)
    for read in (trace.efficiency_loss, trace.separability_loss, trace.sparsity, trace.active_counts):
        with pytest.raises(UserError, match="no real token"):
            read()


class Probe:
    """Lives as long as the graph node that it is tied to."""


def test_nothing_is_left_behind(routed, batch):
    model, probes = routed(), []

    def tie(module, args, scores):
        probe = scores.grad_fn.metadata["probe"] = Probe()
        probes.append(weakref.ref(probe))

    for ffn in expert_ffns(model).values():
        ffn.selector.register_forward_hook(tie)
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert all(ffn.recorder is None for ffn in expert_ffns(model).values())
    gc.collect()
    assert [type(probe()) for probe in probes] == [Probe, Probe], "the losses need the graph"
    trace.efficiency_loss().backward()
    del trace
    gc.collect()
    assert [probe() for probe in probes] == [None, None]


def test_after_an_error_inside_nothing_records(routed, batch):
    model = routed()
    with pytest.raises(KeyError), RouterTrace(model):
        raise KeyError
    assert all(ffn.recorder is None for ffn in expert_ffns(model).values())


def checkpointing(model, use_reentrant):
    # transformers 5.23 renamed the method, and warns under the old name.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def losses_and_gradients(model, batch, masks, labels, backward_inside):
    def losses(task_loss):
        return torch.stack([task_loss, trace.efficiency_loss(), trace.separability_loss()])

    with RouterTrace(model, *masks) as trace:
        values = losses(model(**batch, labels=labels).loss)
        if backward_inside:
            values.sum().backward()
    if not backward_inside:
        values.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert [scores.shape[0] for scores in trace.scores().values()] == [14, 14]
    return values.detach(), gradients


@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing_counts_nothing_twice(routed, batch, masks, labels, family, backward_inside):
    given = (batch, masks, labels, backward_inside)
    expected, expected_gradients = losses_and_gradients(routed(family, dropout=0.0).train(), *given)
    model = routed(family, dropout=0.0).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no gradient checkpointing for it")
    checkpointing(model, use_reentrant=False)
    runs = []
    for ffn in expert_ffns(model).values():
        ffn.selector.register_forward_hook(lambda *args: runs.append(args))
    values, gradients = losses_and_gradients(model, *given)
    assert len(runs) == 4, "each layer runs twice, or nothing was checkpointed"
    torch.testing.assert_close(values, expected)
    assert any(name.endswith("selector.weight") for name in gradients)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def test_reentrant_checkpointing_is_refused(routed, batch, row_family):
    model = routed(row_family).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no gradient checkpointing for it")
    checkpointing(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"no gradient .*'use_reentrant': False"), RouterTrace(model):
        model(**batch)
    assert all(ffn.recorder is None for ffn in expert_ffns(model).values())


def test_figures_without_gradients_are_fine(routed, batch):
    model = routed()
    with RouterTrace(model) as evaluating, torch.no_grad():
        model(**batch)
    with torch.no_grad(), RouterTrace(model.train()) as training:
        model(**batch)
    assert not evaluating.efficiency_loss().requires_grad
    assert not training.efficiency_loss().requires_grad


def test_frozen_routers_need_no_gradient(routed, batch):
    model = routed(mode="hard").train()
    for ffn in expert_ffns(model).values():
        ffn.selector.requires_grad_(False)
    with RouterTrace(model) as trace:
        model(**batch).logits.sum().backward()
    assert 0 < trace.sparsity() < 1


def test_the_floor_is_all_sparse(build, batch):
    model = convert(build(), LteConfig(SIZE, "contiguous", selector="none"), progress=False).train()
    set_mode(model, "hard")
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert trace.sparsity() == 1.0


def test_half_precision_gives_losses_in_float32(routed, batch):
    model = routed().to(torch.bfloat16)
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    assert {scores.dtype for scores in trace.scores().values()} == {torch.float32}
    assert trace.efficiency_loss().dtype == trace.separability_loss().dtype == torch.float32

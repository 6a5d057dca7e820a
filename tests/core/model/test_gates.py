"""Selectors that scale what they select, and routers that learn in hard mode, in whole models."""

import logging

import pytest
import torch

from lte_lightning import LteConfig, convert, from_pretrained, save_pretrained, set_mode
from lte_lightning.core.accounting.cost import token_cost
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.kernels import dispatch

KINDS = ["softmax", "sigmamoe"]
SPARSITY = 2 / 3  # keeps 2 of 6


@pytest.fixture
def gated(build, scatter):
    """`gated(selector, family)`: a converted model whose gates have random weights, in eval mode."""

    def gated(selector, family="bert", grouping="kmeans"):
        config = LteConfig(16, grouping, selector, SPARSITY)
        return scatter(convert(build(family), config, progress=False))

    return gated


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("selector", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_both_modes_are_the_sum_of_gated_experts(mode, selector, family, gated, batch):
    model = gated(selector, family)
    set_mode(model, mode)
    seen = []
    for ffn in expert_ffns(model).values():
        ffn.register_forward_hook(lambda ffn, args, output: seen.append((ffn, args[0], output)))
    logits(model, batch)
    assert len(seen) == 2
    for ffn, x_BTD, out_BTD in seen:
        x_ND = x_BTD.flatten(0, -2).detach()
        logits_NE = x_ND @ ffn.selector.weight.T
        with torch.no_grad():
            hidden_NF = ffn.activation(ffn.up(x_ND) if ffn.gate is None else ffn.gate(x_ND))
            hidden_NF = hidden_NF if ffn.gate is None else hidden_NF * ffn.up(x_ND)
            for n, logits_E in enumerate(logits_NE):
                kept = logits_E.topk(2)
                gates = kept.values.softmax(0) if selector == "softmax" else kept.values.sigmoid()
                expected_D = torch.zeros(ffn.width) if ffn.down.bias is None else ffn.down.bias.clone()
                for expert, gate in zip(kept.indices.tolist(), gates, strict=True):
                    neurons = slice(expert * 16, expert * 16 + 16)
                    expected_D += gate * (ffn.down.weight[:, neurons] @ hidden_NF[n, neurons])
                torch.testing.assert_close(out_BTD.flatten(0, -2)[n], expected_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", KINDS)
def test_sparsity_is_what_was_asked_for(selector, gated, batch, masks):
    model = gated(selector)
    set_mode(model, "hard")
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)
    assert trace.sparsity() == pytest.approx(SPARSITY)


@pytest.mark.parametrize("selector", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_balance_losses_are_those_of_the_real_tokens(selector, family, gated, batch, masks):
    model = gated(selector, family).eval()
    set_mode(model, "soft")
    with RouterTrace(model, *masks) as trace:
        model(**batch)
    found = trace.balance_loss()
    expected = 0.0
    for name, ffn in expert_ffns(model).items():
        own = ffn.selector
        gates_NE = trace.scores()[name]
        mask_BT = masks[ffn.stack].bool()
        assert len(gates_NE) == int(mask_BT.sum())
        if selector == "softmax":
            sums_E = gates_NE.sum(0)
            expected += 0.1 * (((sums_E - sums_E.mean()) ** 2).mean() / sums_E.mean() ** 2).item()
        else:
            (x_BTD,) = trace._inputs[name]
            share_E = torch.stack([own.logits(x_D).softmax(0) for x_D in x_BTD[mask_BT]]).mean(0)
            expected += 0.001 * (share_E * share_E.log()).sum().item()
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert all(ffn.selector.weight.grad.abs().max() > 0 for ffn in expert_ffns(model).values())


@pytest.mark.parametrize("selector", KINDS)
def test_padding_changes_no_balance_loss(selector, gated, batch, masks):
    model = gated(selector)
    set_mode(model, "soft")
    losses = []
    for filler in (1, 2):
        ids_BT = batch["input_ids"].where(masks[0].bool(), filler)
        with RouterTrace(model, *masks) as trace:
            model(**batch | {"input_ids": ids_BT})
        losses.append(trace.balance_loss().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("selector", KINDS)
def test_a_trace_without_gradients_keeps_no_inputs(selector, gated, batch, masks):
    model = gated(selector)
    set_mode(model, "hard")
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)
    assert not any(trace._inputs.values())


@pytest.mark.parametrize("selector", KINDS)
def test_round_trip(selector, gated, batch, tmp_path):
    model = gated(selector)
    set_mode(model, "hard")
    expected = logits(model, batch)
    loaded = from_pretrained(save_pretrained(model, tmp_path / "saved"))
    assert loaded.lte_config == model.lte_config
    assert logits(loaded, batch).equal(expected)


def test_a_sparse_backend_leaves_them_to_the_masks_and_says_so(gated, batch, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level(logging.WARNING, "lte_lightning")
    model = gated("softmax")
    set_mode(model, "hard")
    expected = logits(model, batch)
    set_backend(model, "reference")
    torch.testing.assert_close(logits(model, batch), expected)
    assert "NoisySoftmax scales experts, which no sparse backend does" in " ".join(caplog.messages)


def test_noise_weights_are_charged_to_nobody(gated):
    softmax, router = (token_cost(gated(name), [SPARSITY] * 2) for name in ("softmax", "sigmamoe"))
    assert softmax == router


def test_straight_through_is_hard_forwards_and_soft_backwards(build, batch, scatter):
    model = scatter(convert(build("bert", dropout=0.0), LteConfig(16), progress=False)).double()
    ffn, other = expert_ffns(model).values()
    other.mode = "dense"
    ffn.mode = "hard"
    hard = logits(model, batch)
    ffn.straight_through = True
    assert logits(model, batch).equal(hard)

    # by hand: the mask's part of the graph replaced by the scores'
    x_BTD = torch.randn(2, 3, ffn.width, dtype=torch.float64)
    scores_BTE = ffn.selector(x_BTD)
    hidden_BTF = ffn.activation(ffn.up(x_BTD)).detach()
    upstream_BTD = torch.randn(2, 3, ffn.width, dtype=torch.float64)
    per_expert_BTE = (hidden_BTF * (upstream_BTD @ ffn.down.weight)).unflatten(-1, (ffn.experts, -1)).sum(-1).detach()
    expected = torch.autograd.grad((scores_BTE * per_expert_BTE).sum(), ffn.selector.weight)[0]
    found = torch.autograd.grad((ffn(x_BTD) * upstream_BTD).sum(), ffn.selector.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert float(found.abs().max()) > 0


def test_straight_through_is_off_at_first(build, batch, scatter):
    model = scatter(convert(build("bert"), LteConfig(16), progress=False))
    set_mode(model, "hard")
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is None for parameter in selector_parameters(model))


@pytest.mark.parametrize("selector", KINDS)
def test_gradient_checkpointing_repeats_noise_and_dropout(selector, gated, batch, masks, labels):
    gradients = []
    for checkpointing in (False, True):
        model = gated(selector).train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # transformers 5.23 renamed it
            getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
        set_mode(model, "soft")
        torch.manual_seed(5)
        with RouterTrace(model, *masks) as trace:
            loss = model(**batch, labels=labels).loss
        (loss + trace.balance_loss()).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for whole, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, whole)

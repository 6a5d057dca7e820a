import pytest
import torch

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, group_experts
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.grouping import group_neurons
from lte_lightning.core.routing.calibrate import calibrate
from lte_lightning.core.routing.observe import imitation_loss, neuron_activations, observe
from lte_lightning.errors import UserError


def inputs_of(model):
    ids_BT = torch.randint(3, 60, (2, 6))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids_BT, "attention_mask": mask_BT}, (mask_BT,)
    decoder_BT = torch.randint(3, 60, (2, 5))
    decoder_mask_BT = torch.ones_like(decoder_BT)
    decoder_mask_BT[0, 3:] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "decoder_input_ids": decoder_BT}
    return batch, (mask_BT, decoder_mask_BT)


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "t5", "bart"])
def test_every_ffn_is_seen_with_the_real_tokens_of_its_stack(family, build):
    model = convert(build(family), LteConfig(8, "contiguous"), progress=False).eval()
    batch, masks = inputs_of(model)
    seen = []
    with torch.no_grad(), observe(model, lambda *each: seen.append(each), *masks):
        model(**batch)
    assert {id(ffn) for ffn, *_ in seen} == {id(ffn) for ffn in expert_ffns(model).values()}
    for ffn, did in seen:
        x_ND, gate_NF, hidden_NF = did.x_ND, did.gate_NF, did.hidden_NF
        tokens = int(masks[ffn.stack].sum())
        assert x_ND.shape == (tokens, ffn.width)
        assert gate_NF.shape == hidden_NF.shape == (tokens, ffn.neurons)
        assert (gate_NF is hidden_NF or gate_NF.equal(hidden_NF)) == (ffn.gate is None)


def test_padding_changes_no_level(build):
    model = convert(build("bert"), LteConfig(8, "contiguous", "cats", 0.5), progress=False).eval()
    batch, masks = inputs_of(model)
    calibrate(model, iter([(lambda: model(**batch), masks)]), 1000)
    levels = [float(ffn.selector.level) for ffn in expert_ffns(model).values()]
    changed = batch | {"input_ids": batch["input_ids"].where(masks[0].bool(), 7)}
    calibrate(model, iter([(lambda: model(**changed), masks)]), 1000)
    assert [float(ffn.selector.level) for ffn in expert_ffns(model).values()] == pytest.approx(levels, rel=1e-5)


def test_imitation_reaches_the_predictors_alone(build):
    model = convert(build("llama"), LteConfig(8, "contiguous", "moefication", 0.5), progress=False).train()
    batch, masks = inputs_of(model)
    imitation_loss(model, lambda: model(**batch), *masks).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".selector." in name}


def test_a_mask_of_another_shape_is_refused(build):
    model = convert(build("bert"), LteConfig(8, "contiguous"), progress=False).eval()
    batch, _ = inputs_of(model)
    with (
        pytest.raises(UserError, match=r"mask has shape \(2, 5\), the tokens \(2, 6\)"),
        observe(model, print, torch.ones(2, 5)),
    ):
        model(**batch)


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "t5"])
def test_activations_of_every_neuron_on_real_tokens(family, build):
    model = convert(build(family), LteConfig(8, "coactivation"), progress=False, group=False).eval()
    batch, masks = inputs_of(model)
    seen = []
    with torch.no_grad(), observe(model, lambda ffn, did: seen.append(did.hidden_NF.abs()), *masks):
        model(**batch)
    found = neuron_activations(model, iter([(lambda: model(**batch), masks)] * 2), 100)
    assert len(found) == len(seen) == 2
    for activations_FN, once_NF in zip(found, seen, strict=True):
        torch.testing.assert_close(activations_FN.float().T, torch.cat([once_NF, once_NF]), rtol=0.01, atol=0)
    cut = neuron_activations(model, iter([(lambda: model(**batch), masks)] * 2), 3)
    assert all(few_FN.equal(all_FN[:, :3]) for few_FN, all_FN in zip(cut, found, strict=True))


def test_grouping_by_activations_keeps_the_function(build):
    model = convert(build("bert"), LteConfig(8, "coactivation", seed=3), progress=False, group=False).eval()
    batch, masks = inputs_of(model)
    batches = [(lambda: model(**batch), masks)]
    activations = neuron_activations(model, iter(batches), 100)
    with torch.no_grad():
        expected = model(**batch).logits
    first_up = next(iter(expert_ffns(model).values())).up.weight.detach().clone()
    groupings = group_experts(model, progress=False, activations=activations)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    first = group_neurons(activations[0], 8, "coactivation", 3).permutation_F
    assert groupings[0].permutation_F.equal(first)
    assert next(iter(expert_ffns(model).values())).up.weight.equal(first_up[first])
    assert all(grouping.inertia < grouping.random_inertia for grouping in groupings)


def test_no_token_to_group_by(build):
    model = convert(build("bert"), LteConfig(8, "coactivation"), progress=False, group=False).eval()
    with pytest.raises(UserError, match="hold no tokens"):
        neuron_activations(model, iter([]), 100)


def test_single_neurons_need_no_activations(build):
    assert expert_ffns(convert(build("bert"), LteConfig(1, "coactivation"), progress=False))

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lte_lightning import LteConfig, convert
from lte_lightning.core.accounting.budget import meet_budget
from lte_lightning.core.accounting.cost import cost_beside_dense
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError

BERT = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, pad_token_id=0
)
LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=192)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=256, num_layers=2, num_decoder_layers=1, num_heads=2)
MODELS = {
    "bert": lambda: BertForMaskedLM(BERT),
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "t5": lambda: T5ForConditionalGeneration(T5),
}


def taken(model, config, name):
    """What the model takes of the dense one at the configuration's target."""
    converted = convert(copy.deepcopy(model), config, progress=False, group=False)
    cost = cost_beside_dense(converted, [config.target_sparsity] * len(expert_ffns(converted)))
    return cost[f"{name}_per_token"] / cost[f"dense_{name}_per_token"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("selector", ["router", "narrow", "dejavu", "cats", "teal"])
@pytest.mark.parametrize(("name", "share"), [("flops", 0.7), ("flops", 0.95), ("bytes", 0.96)])
def test_the_sparsity_costs_what_was_asked_for(model, selector, name, share):
    model = MODELS[model]()
    size = 1 if selector in ("cats", "teal") else 16
    config = LteConfig(size, "contiguous", selector, **{f"target_{name}": share})
    found = meet_budget(model, config)
    assert found.budget is None
    assert found.selector == selector
    assert taken(model, found, name) == pytest.approx(share, abs=2e-3)


def test_more_may_be_spent_at_less_sparsity():
    model = MODELS["llama"]()
    sparsities = [meet_budget(model, LteConfig(16, target_flops=share)).target_sparsity for share in (0.6, 0.7, 0.9)]
    assert sparsities == sorted(sparsities, reverse=True)


@pytest.mark.parametrize("converted", [False, True])
def test_the_model_stays_what_it_was(converted):
    model = MODELS["bert"]().eval()
    if converted:
        convert(model, LteConfig(16, "random"), progress=False)
    ids = torch.randint(64, (2, 8))
    before, names = model(ids).logits, list(model.state_dict())
    meet_budget(model, LteConfig(16, target_bytes=0.9))
    assert bool(expert_ffns(model)) == converted
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)


def test_out_of_reach_is_said_with_what_can_be_reached():
    model = MODELS["bert"]()
    with pytest.raises(UserError, match=r"target_flops is 0.05, out of reach: .* takes 0\.\d+ of") as refused:
        meet_budget(model, LteConfig(16, target_flops=0.05))
    least = float(str(refused.value).partition("takes ")[2].partition(" ")[0])
    assert meet_budget(model, LteConfig(16, target_flops=least + 0.01)).target_sparsity > 0.95


def test_what_pruning_costs_is_not_known_before():
    with pytest.raises(UserError, match="known once it has pruned; give target_sparsity in place of target_flops"):
        meet_budget(MODELS["llama"](), LteConfig(1, selector="wanda", target_flops=0.8))


def test_without_a_budget_nothing_is_resolved():
    config = LteConfig(16, target_sparsity=0.5)
    assert meet_budget(MODELS["bert"](), config) is config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_flops": 0.5, "target_sparsity": 0.8},
            "target_sparsity 0.8 and target_flops 0.5 each set the sparsity",
        ),
        ({"target_flops": 0.5, "target_bytes": 0.5}, "target_flops 0.5 and target_bytes 0.5 each set the sparsity"),
        ({"target_flops": 1.5}, "target_flops is 1.5; it is a share of the dense model's flops"),
        ({"target_bytes": 0.0}, "target_bytes is 0.0; it is a share"),
        ({"target_bytes": 0.5, "sparsity_per_layer": [0.5, 0.6]}, "so target_bytes 0.5 has nothing to decide"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LteConfig(**options)


def test_convert_wants_a_sparsity():
    model = MODELS["bert"]()
    with pytest.raises(UserError, match="target_bytes is not a sparsity yet"):
        convert(model, LteConfig(16, target_bytes=0.8))
    assert not expert_ffns(model)

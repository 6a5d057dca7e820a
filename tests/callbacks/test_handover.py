"""What an optimizer knows goes with the weights into the next stage."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lte_lightning import LteConfig, convert
from lte_lightning.callbacks.handover import hand_over
from lte_lightning.core.model.convert import group_experts, selector_parameters
from lte_lightning.core.model.experts import expert_ffns

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def made(model_type):
    torch.manual_seed(0)
    sizes = SIZES | ({"n_inner": 32} if model_type == "gpt2" else {"intermediate_size": 32})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, bos_token_id=1, eos_token_id=2))
    convert(model.eval(), LteConfig(expert_size=8), group=False)
    for parameter in selector_parameters(model):
        parameter.requires_grad_(False)
    return model


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(model, optimizer, count):
    for step in range(count):
        ids_BT = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2 stores weights transposed, and has biases
def test_regrouped_neurons_go_on_as_if_they_had_always_stood_there(model_type):
    ours, theirs = made(model_type), made(model_type)
    first = optimizer_of(ours)
    steps(ours, first, 3)
    orders = [grouping.permutation_F for grouping in group_experts(ours, progress=False)]
    assert any(not torch.equal(order_F, torch.arange(32)) for order_F in orders)
    second = optimizer_of(ours)
    hand_over(dict(first.state), second, ours, orders)
    steps(ours, second, 3)

    for ffn, order_F in zip(expert_ffns(theirs).values(), orders, strict=True):
        ffn.permute(order_F)
    optimizer = optimizer_of(theirs)
    steps(theirs, optimizer, 6 - 3)
    steps(theirs, optimizer, 3)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, ours.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_trained_no_longer_is_left_behind():
    model = made("llama")
    first = optimizer_of(model)
    steps(model, first, 1)
    second = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-2)
    hand_over(dict(first.state), second, model, [])
    assert list(second.state) == list(model.lm_head.parameters())
    assert int(second.state[model.lm_head.weight]["step"]) == 1

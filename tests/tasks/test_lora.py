"""LoRA on attention; most tests need peft."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.tasks.lora import Lora, add_lora, merge_lora


def needs_peft():
    pytest.importorskip("peft", reason='needs the extra "peft": pip install "lte-lightning[peft]"')


CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=32
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=32, vocab_size=32, n_positions=16),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[request.param])).eval()
    return lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8))


IDS = torch.arange(12).view(2, 6)


def test_adapters_change_nothing_at_first_and_attention_alone_is_frozen(model):
    needs_peft()
    before = model(IDS).logits
    whole = {name for name, _ in model.named_parameters()}
    targets = add_lora(model, Lora(rank=2))
    assert torch.allclose(model(IDS).logits, before, atol=1e-6)
    assert len(targets) == {"llama": 2 * 4, "gpt2": 2 * 2}[model.config.model_type]
    frozen = {name.replace(".base_layer", "") for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in whole if name.rpartition(".")[0] in targets}
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * len(targets)
    assert all(p.requires_grad for p in adapters)
    assert all(p.requires_grad for ffn in expert_ffns(model).values() for p in ffn.parameters())


def test_merged_it_is_the_same_function_and_an_ordinary_model(model, tmp_path):
    needs_peft()
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, Lora(rank=2))
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    expected = model(IDS).logits
    merge_lora(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    lte_lightning.save_pretrained(model, tmp_path / "model")
    assert torch.allclose(lte_lightning.from_pretrained(tmp_path / "model")(IDS).logits, expected, atol=1e-5)
    merge_lora(model)  # nothing is left to do


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none(rank):
    with pytest.raises(UserError, match=f"lora.rank is {rank}"):
        Lora(rank=rank)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lte-lightning\[peft\]"):
        Lora()


def test_projections_that_are_to_be_pruned_get_no_adapters():
    config = lte_lightning.LteConfig(8, selector="wanda", target_sparsity=0.5, wanda_scope="layers")
    model = lte_lightning.convert(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])), config)
    with pytest.raises(UserError, match=r"lora freezes.*leave lora out, or set wanda_scope to ffn"):
        add_lora(model, Lora(rank=2))

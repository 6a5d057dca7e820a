import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.tasks.starting_model import load


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=2, **sizes))


def load_from(folder, labels=2, config=None):
    return load(AutoModelForSequenceClassification, str(folder), {"num_labels": labels}, config, seed=0)


def test_a_half_precision_checkpoint_trains_in_float32(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path / "plain")
    loaded, about = load_from(tmp_path / "plain", config=lte_lightning.LteConfig(expert_size=8))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.training
    assert about == {}


@pytest.mark.parametrize(("mode", "stage"), [("dense", "dense"), ("soft", "router"), ("hard", "expert")])
def test_a_model_saved_from_python_goes_on_in_the_stage_of_its_mode(model, tmp_path, mode, stage):
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8))
    lte_lightning.set_mode(model, mode)
    lte_lightning.save_pretrained(model, tmp_path / "lte")
    loaded, about = load_from(tmp_path / "lte")
    assert about["stage"] == stage
    for mine, saved in zip(expert_ffns(loaded).values(), expert_ffns(model).values(), strict=True):
        assert torch.equal(mine.selector.weight, saved.selector.weight)


def test_a_head_of_another_size_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="cannot load the model"):
        load_from(tmp_path / "two", labels=3)


def load_lm(folder, **changes):
    return load(AutoModelForCausalLM, str(folder), {}, lte_lightning.LteConfig(expert_size=8), seed=0, **changes)[0]


@pytest.fixture(params=["llama", "gpt2"])
def lm_folder(request, tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
    config = LlamaConfig(num_hidden_layers=3, **sizes)
    if request.param == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=3, n_head=2, n_inner=32, vocab_size=32, n_positions=16)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_the_first_layers_of_a_pretrained_model(lm_folder):
    whole, cut = load_lm(lm_folder), load_lm(lm_folder, layers=2)
    assert len(expert_ffns(cut)) == cut.config.num_hidden_layers == 2
    names = dict(whole.named_parameters())
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, names[name]), name


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_a_model_does_not_have(lm_folder, layers):
    with pytest.raises(UserError, match=f"layers is {layers}, but .* has 3"):
        load_lm(lm_folder, layers=layers)


def test_random_weights_of_a_changed_configuration(lm_folder):
    first, again = (load_lm(lm_folder, from_scratch={"hidden_size": 24}) for _ in range(2))
    assert first.get_input_embeddings().weight.shape == (32, 24)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))
    same = load_lm(lm_folder, from_scratch={})
    assert not torch.equal(same.get_input_embeddings().weight, load_lm(lm_folder).get_input_embeddings().weight)
    with pytest.raises(UserError, match=r"the configuration of .* has no hidden_sizes"):
        load_lm(lm_folder, from_scratch={"hidden_sizes": 24})

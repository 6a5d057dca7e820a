import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import lte_lightning
from lte_lightning.core.convert import expert_ffns
from lte_lightning.core.errors import UserError
from lte_lightning.tasks.loading import load


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

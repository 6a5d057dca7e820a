"""Transformers' Auto classes and pipelines on saved models, with `register` and without."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from lte_lightning import LteConfig, convert, from_pretrained, register, save_pretrained, set_mode
from lte_lightning.core.model.experts import expert_ffns

TEXTS = ["Input: the cat", "a fish. Answer"]
SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def registered():
    register()
    yield
    register(False)


@pytest.fixture
def saved(tmp_path, make_lm_tokenizer, scatter):
    """`saved(kind)`: the folder of a model in hard mode, with its tokenizer."""

    def saved(kind):
        tokenizer = make_lm_tokenizer(chat=True, pad_token="<pad>", eos_token="</s>")
        shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **SIZES}
        if kind == "lm":
            model = LlamaForCausalLM(LlamaConfig(eos_token_id=tokenizer.eos_token_id, **shared))
            model.generation_config.max_new_tokens = 5
        else:
            labels = {0: "bad", 1: "good"}
            config = BertConfig(id2label=labels, label2id={"bad": 0, "good": 1}, **shared)
            model = BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        set_mode(scatter(convert(model, LteConfig(16), progress=False)), "hard")
        save_pretrained(model, tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return saved


def scores(classify):
    return [(each["label"], each["score"]) for each in classify(TEXTS)]


def test_without_it_they_are_dense(saved):
    folder = saved("classifier")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not expert_ffns(model)
    dense = from_pretrained(folder, backend="dense-mask")
    set_mode(dense, "dense")
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).logits.equal(dense(ids).logits)
    register()
    register(False)
    assert not expert_ffns(AutoModelForSequenceClassification.from_pretrained(folder))


@pytest.mark.usefixtures("registered")
def test_with_it_they_are_sparse(saved, build, tmp_path):
    folder, ids = saved("lm"), torch.tensor([[1, 2, 3]])
    sparse = from_pretrained(folder, backend="dense-mask")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, backend="dense-mask"
    )
    assert not any(info.values())
    assert {ffn.mode for ffn in expert_ffns(model).values()} == {"hard"}
    assert model(ids).logits.equal(sparse(ids).logits)
    base = AutoModel.from_pretrained(folder, backend="dense-mask")
    assert base(ids).last_hidden_state.equal(sparse.model(ids).last_hidden_state)
    build("llama", "lm").save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not expert_ffns(plain)
    assert "lte_config" not in vars(plain)
    with pytest.raises(TypeError, match="takes options by name"):
        AutoModelForCausalLM.from_pretrained(folder, "positional")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["classifier", "lm"])
def test_pipelines_of_folders(saved, kind):
    folder = saved(kind)
    task = {"classifier": "text-classification", "lm": "text-generation"}[kind]
    by_folder = pipeline(task, model=str(folder), device="cpu")
    assert len(expert_ffns(by_folder.model)) == 2
    register(False)
    by_model = pipeline(task, model=from_pretrained(folder), tokenizer=by_folder.tokenizer, device="cpu")
    dense = pipeline(task, model=str(folder), device="cpu")
    assert not expert_ffns(dense.model)
    if kind == "classifier":
        assert scores(by_folder) == scores(by_model) != scores(dense)
        assert {label for label, _ in scores(by_model)} <= {"bad", "good"}
    else:
        texts = [each[0]["generated_text"] for each in by_model(TEXTS, do_sample=False)]
        assert texts == [each[0]["generated_text"] for each in by_folder(TEXTS, do_sample=False)]
        assert by_folder.tokenizer.chat_template
        assert by_model.model.generation_config.max_new_tokens == 5

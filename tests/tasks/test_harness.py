import builtins
import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lte_lightning
from lte_lightning.core.convert import expert_ffns
from lte_lightning.core.errors import UserError
from lte_lightning.tasks.harness import evaluate


@pytest.fixture
def model(make_lm_tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(make_lm_tokenizer()), max_position_embeddings=256, **sizes)
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


# What the harness and its own dependencies warn of.
@pytest.mark.filterwarnings("ignore")
def test_with_all_experts_on_the_harness_finds_what_the_original_model_gives(model, make_lm_tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason='needs the extra "harness": pip install "lte-lightning[harness]"')
    rows = [{"question": f"{text} eats", "choices": [" a cat", " a fish", " the dog"], "answer": i % 3} for i, text in
            enumerate(["the cat", "the dog", "the owl", "a fish", "a bird", "the cow"])]  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "meals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    tokenizer = make_lm_tokenizer(pad_token="<unk>")

    # without the harness's own thousands of tasks, whose files it would read first
    tasks = pytest.importorskip("lm_eval.tasks")
    options = {"bootstrap_iters": 10, "task_manager": tasks.TaskManager(include_defaults=False)}

    def figures(tested):
        found = evaluate(tested, tokenizer, [copy.deepcopy(task)], **options)["meals"]
        return {key: value for key, value in found.items() if isinstance(value, float)}

    original = figures(model)
    assert {"acc,none", "acc_norm,none"} <= set(original)
    converted = lte_lightning.convert(copy.deepcopy(model), lte_lightning.LteConfig(expert_size=8))
    for mode in ("dense", "hard"):
        lte_lightning.set_mode(converted, mode)
        for ffn in expert_ffns(converted).values():
            ffn.selector.bias.data.fill_(30.0)
        assert figures(converted) == pytest.approx(original)
    for ffn in expert_ffns(converted).values():
        ffn.selector.bias.data.fill_(-30.0)
    # Another model, which the harness may well find as good: it is the likelihoods that tell whether it ran this one
    with lte_lightning.RouterTrace(converted) as trace:
        figures(converted)
    assert trace.sparsity() == 1.0


def test_without_the_harness_it_says_what_to_install(model, make_lm_tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError("no lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"lte-lightning\[harness\]"):
        evaluate(model, make_lm_tokenizer(), ["arc_easy"])

"""MMLU through the command line, against likelihoods taken one question at a time."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte_lightning
from lte_lightning.core.model.experts import set_mode


@pytest.fixture(scope="module")
def sparse(tiny_lm, tmp_path_factory):
    """The tiny decoder with experts, of which some run, in hard mode."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.model)
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8, router_margin=0.0))
    set_mode(model, "hard")
    lte_lightning.save_pretrained(model, folder)
    return folder


def by_hand(model, tokenizer, rows):
    opening = "The following are multiple choice questions (with answers) about {}.\n\n"
    asked = "who eats?\nA. a cat\nB. a dog\nC. a cow\nD. an owl\nAnswer:"
    found = []
    for row in rows:
        prompt = opening.format(row["subject"].replace("_", " ")) + f"{asked} B\n\n{asked}"
        likelihoods = []
        for letter in "ABCD":
            ids = tokenizer(f"{prompt} {letter}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                likelihoods.append(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item())
        found.append(likelihoods)
    return found


@pytest.mark.parametrize("routed", [False, True])
def test_mmlu(routed, tiny_lm, sparse, lightning, tmp_path):
    weights = ("--model.init_from", sparse, "--model.init_args.lte", "null") if routed else ()
    outcome = lightning(tmp_path, tiny_lm.config("MmluData"), "test", *weights)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tiny_lm.task("mmlu") / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.model)
    load = lte_lightning.from_pretrained if routed else AutoModelForCausalLM.from_pretrained
    expected = by_hand(load(sparse if routed else tiny_lm.model).eval(), tokenizer, rows)
    predictions = [json.loads(line) for line in (outcome.written.parent / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in predictions] == list(range(10))
    for prediction, likelihoods in zip(predictions, expected, strict=True):
        assert prediction["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-3)
    right = [
        "ABCD".index(p["prediction"]) == row["answer"] == max(range(4), key=lambda i, values=values: values[i])
        for p, row, values in zip(predictions, rows, expected, strict=True)
    ]
    found = outcome.results
    per_subject = {
        subject: [r for r, row in zip(right, rows, strict=True) if row["subject"] == subject]
        for subject in ("big_cats", "dogs")
    }
    assert found["accuracy_per_subject"] == {name: sum(values) / len(values) for name, values in per_subject.items()}
    assert found["macro_accuracy"] == pytest.approx(sum(found["accuracy_per_subject"].values()) / 2)
    assert found["accuracy"] == sum(right) / 10
    assert (found["questions"], found["fewer_shots"]) == (10, 0)
    assert (found["sparsity"] > 0) == routed
    assert "accuracy_per_subject" not in outcome.out.replace(str(outcome.written), "")


def test_a_test_on_another_task_leaves_what_the_run_s_own_has_found(tiny_lm, lightning, tmp_path):
    config = tiny_lm.config("InstructData", epochs=(1, 0, 0), **{"trainer.logger": True})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    model = ("--model.init_from", fit.run / "model")
    own = lightning(tmp_path, tiny_lm.config("InstructData"), "test", *model)
    other = lightning(tmp_path, tiny_lm.config("MmluData", **{"trainer.logger": True}), "test", *model)
    assert (own.written, other.written) == (fit.run / "test.json", fit.run / "test-mmlu.json")
    assert "rouge_l" in own.results
    assert "macro_accuracy" in other.results
    rows = {
        name: len((fit.run / name).read_text().splitlines()) for name in ("predictions.jsonl", "predictions-mmlu.jsonl")
    }
    assert rows == {"predictions.jsonl": own.results["examples"], "predictions-mmlu.jsonl": 10}
    assert (fit.run / "artifacts" / "test-mmlu.json").exists()
    assert "MmluData" in (fit.run / "config-test.yaml").read_text()
    assert "DataLoader" not in own.out
    for key in ("perplexity", "rouge_l", "bleu"):
        (line,) = (line for line in own.out.splitlines() if line.split()[1:2] == [key])
        assert line.split()[3] == f"{own.results[key]:.4f}"


def test_mmlu_is_not_trained_on(tiny_lm, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny_lm.config("MmluData"), "fit")
    assert outcome.code == 1
    assert "MMLU is an evaluation" in outcome.err

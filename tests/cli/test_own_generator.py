"""Own conversations and own text through all stages, and answers to a file of questions."""

import json
from pathlib import Path

import pytest

from .conftest import ANIMALS

CONF = Path(__file__).parents[2] / "conf" / "own-chat.yaml"
TINY = ["--model.lte.expert_size", 8, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(speaker, text):
    return {"from": speaker, "value": text}


def test_conversations_of_one_file_to_a_sparse_model_that_answers(tiny_lm, lightning, tmp_path):
    rows = [{"conversations": [turn("human", f"say {animal}"), turn("gpt", animal)]} for animal in ANIMALS] * 4
    write(tmp_path / "chats.jsonl", rows)
    words = ["--config", CONF, "--data.source", "chats.jsonl", "--model.pretrained", tiny_lm.model, *TINY]
    lengths = ["--data.max_length", 200, "--data.max_new_tokens", 8, "--trainer.logger", "false"]
    fit = lightning(tmp_path, None, "fit", *words, *lengths)
    assert fit.code == 0, fit.err
    assert fit.results["hard"] > 1
    assert fit.results["sparsity"] == pytest.approx(0.8, abs=0.1)  # asked for, not found
    questions = write(tmp_path / "questions.jsonl", [{"conversations": rows[0]["conversations"][:1]}])
    weights = ["--config", fit.run / "config.yaml", "--model.init_from", fit.run / "model"]
    answers = lightning(tmp_path, None, "predict", *weights, "--data.source", questions)
    assert answers.code == 0, answers.err
    (answer,) = [json.loads(line) for line in answers.written.read_text().splitlines()]
    assert "say cat" in answer["prompt"]
    assert isinstance(answer["prediction"], str)


@pytest.mark.parametrize(("samples", "code"), [(0, 0), (2, 1)])
def test_room_to_generate_is_asked_for_by_samples_alone(samples, code, tiny_lm, lightning, tmp_path):
    write(tmp_path / "chats.jsonl", [{"prompt": "say", "completion": animal} for animal in ANIMALS] * 2)
    words = ["--config", CONF, "--data.source", "chats.jsonl", "--model.pretrained", tiny_lm.model, *TINY]
    options = ["--data.max_length", 32, "--model.samples", samples, "--trainer.fast_dev_run", "true"]
    fit = lightning(tmp_path, None, "fit", *words, *options)
    assert fit.code == code, fit.err
    assert ("leaves no room for a prompt before 100 new tokens" in fit.err) is bool(code)


def test_a_folder_of_notes_adapts_a_language_model(tiny_lm, lightning, tmp_path):
    (tmp_path / "notes").mkdir()
    for animal in ANIMALS:
        (tmp_path / "notes" / f"{animal}.md").write_text(f"# {animal}\n\nthe {animal} eats.\n" * 5)
    words = ["--config", "lte:lm/own-text", "--data.source", "notes", "--model.pretrained", tiny_lm.model, *TINY]
    fit = lightning(tmp_path, None, "fit", *words, "--data.block_size", 32, "--trainer.logger", "false")
    assert fit.code == 0, fit.err
    assert fit.results["word_perplexity"]["hard"] > 1
    assert fit.results["sparsity"] == pytest.approx(0.8, abs=0.1)

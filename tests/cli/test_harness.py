"""`lte harness`: the command that the documentation names, on tasks of one's own."""

import json
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte_lightning


@pytest.fixture(scope="module")
def sparse(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.model)
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8))
    lte_lightning.set_mode(model, "hard")
    lte_lightning.save_pretrained(model, folder)
    AutoTokenizer.from_pretrained(tiny_lm.model).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # what the harness and its own dependencies warn of
def test_own_tasks_and_unknown_ones(sparse, lightning, harness_task, tmp_path):
    pytest.importorskip("lm_eval", reason='needs the extra "harness": pip install "lte-lightning[harness]"')
    rows = [{"question": "the cat eats", "choices": [" a fish", " the dog"], "answer": i % 2} for i in range(4)]
    own = tmp_path / "own"
    own.mkdir()
    (own / "meals.yaml").write_text(yaml.safe_dump(harness_task(rows, "acc")))
    common = ("--model", sparse, "--include", own, "--limit", 3)
    outcome = lightning(tmp_path, None, "harness", *common, "--tasks", "meals", "--out", "figures.json")
    assert outcome.code == 0, outcome.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["meals"]["acc,none"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    wrong = lightning(tmp_path, None, "harness", *common, "--tasks", "meal,meals")
    assert wrong.code == 1
    assert "no task meal (do you mean 'meals'?)" in wrong.err


def test_without_the_harness(sparse, lightning, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    outcome = lightning(tmp_path, None, "harness", "--model", sparse, "--tasks", "arc_easy")
    assert outcome.code == 1
    assert "lte-lightning[harness]" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere", "--tasks", "arc_easy"], "nowhere is no saved LTE model"),
        (["./nowhere", "--tasks", "arc_easy"], "no folder ./nowhere"),
        (["--model", "MODEL", "--tasks", "arc_easy", "--out", "nowhere/x.json"], "no folder"),
    ],
)
def test_bad_input(options, message, sparse, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "harness", *[str(sparse) if word == "MODEL" else word for word in options])
    assert outcome.code == 1
    assert message in outcome.err

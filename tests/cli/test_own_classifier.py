"""A CSV of reviews with five classes through all stages, and the model that comes of it on other files."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from .conftest import BAD, FILLERS, GOOD

CONF = Path(__file__).parents[2] / "conf" / "own-classifier.yaml"
STARS = {"awful": BAD[0], "bad": BAD[1], "fine": GOOD[2], "good": GOOD[0], "great": GOOD[1]}


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def reviews(count, seed):
    generator = random.Random(seed)
    return [
        {"review": " ".join([*generator.choices(FILLERS, k=4), STARS[stars]]), "stars": stars}
        for stars in generator.choices(list(STARS), k=count)
    ]


TINY = [
    "--model.lte.expert_size",
    8,
    "--trainer.accelerator",
    "cpu",
    "--trainer.precision",
    "32-true",
    "--data.max_length",
    16,
]
QUICK = [
    word
    for stage in ("dense", "router", "expert")
    for word in (f"--stages.{stage}.learning_rate", 5e-3, f"--stages.{stage}.epochs", 2)
]


@pytest.fixture(scope="module")
def own(tiny, lightning, tmp_path_factory):
    """The fit; nobody changes its folder."""
    cwd = tmp_path_factory.mktemp("own")
    write(cwd / "reviews.csv", reviews(200, 0))
    named = ["--data.source", "reviews.csv", "--data.text", "review", "--data.label", "stars"]
    words = ["--config", CONF, *named, "--model.pretrained", tiny.model, "--model.metric", "f1_weighted"]
    outcome = lightning(cwd, None, "fit", *words, *TINY, *QUICK, "--trainer.logger", "false", "--data.batch_size", 8)
    assert outcome.code == 0, outcome.err
    return outcome


def test_the_fit_reports_its_metric_by_name_and_learns(own):
    assert own.results["metric"] == "f1_weighted"
    assert own.results["task"] == "reviews"
    assert own.results["dense"] > 0.7
    assert own.results["hard"] > 0.5
    assert "f1_weighted" in own.out


def test_the_model_s_folder_names_the_classes(own):
    config = AutoConfig.from_pretrained(own.run / "model")
    assert config.id2label == dict(enumerate(STARS))
    assert config.label2id == {name: number for number, name in enumerate(STARS)}


@pytest.fixture
def again(own, lightning, tmp_path):
    """Run a command on a copy of the fit's model."""

    def run(command, source, *words, weights=True):
        folder = tmp_path / "runs" / "own-classifier" / "copy"
        shutil.copytree(own.run, folder, dirs_exist_ok=True)
        given = ["--model.init_from", folder / "model"] if weights else []
        config = ["--config", folder / "config.yaml", "--data.source", source]
        return lightning(tmp_path, None, command, *config, *given, *words)

    return run


def test_another_file_is_tested_with_its_confusion_matrix(again, tmp_path):
    rows = [row for row in reviews(60, 1) if row["stars"] != "fine"]  # fewer classes than the model has
    outcome = again("test", write(tmp_path / "others.csv", rows), "--data.holdout", 0)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.written.read_text())
    assert outcome.written.name == "test-others.json"
    assert found["f1_weighted"] > 0.5
    matrix = found["confusion_matrix"]
    assert {name: sum(row.values()) for name, row in matrix.items()} == {
        name: sum(row["stars"] == name for row in rows) for name in STARS if name != "fine"
    }


def test_predictions_are_the_classes_names_in_the_order_of_the_file(again, tmp_path):
    rows = reviews(40, 2)
    outcome = again("predict", write(tmp_path / "new.csv", [{"review": row["review"]} for row in rows]))
    assert outcome.code == 0, outcome.err
    found = [json.loads(line) for line in outcome.written.read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(40))
    assert sum(row["prediction"] == given["stars"] for row, given in zip(found, rows, strict=True)) > 20
    assert all(0 < row["probability"] <= 1 for row in found)


def test_classes_that_the_model_does_not_know_are_told_in_numbers(again, tmp_path):
    rows = [*reviews(30, 3), {"review": "the film", "stars": "odd"}, {"review": "the plot", "stars": "odd"}]
    outcome = again("test", write(tmp_path / "six.csv", rows), "--data.holdout", 0)
    assert outcome.code == 1
    assert "was fine-tuned for 5 classes (awful, bad, fine, good, great), the data have 6 classes" in outcome.err
    swapped = [row | {"stars": row["stars"].replace("fine", "odd")} for row in rows[:30]]
    outcome = again("test", write(tmp_path / "five.csv", swapped), "--data.holdout", 0)
    assert outcome.code == 1
    assert "the data have awful, bad, good, great, odd; data.classes gives the labels in the order" in outcome.err


def test_a_checkpoint_of_other_classes_is_refused(again, own, tmp_path):
    rows = [row for row in reviews(30, 4) if row["stars"] in ("bad", "good")]
    checkpoint = ("--ckpt_path", own.run / "checkpoints" / "best.ckpt")
    outcome = again("test", write(tmp_path / "two.csv", rows), "--data.holdout", 0, *checkpoint, weights=False)
    assert outcome.code == 1
    assert "this checkpoint was trained for 5 classes" in outcome.err
    assert "the data have 2 (bad, good): give the run's model folder by --model.init_from" in outcome.err
    assert "Traceback" not in outcome.err


def test_unlabelled_rows_cannot_say_their_classes_to_a_checkpoint(again, own, tmp_path):
    file = write(tmp_path / "new.csv", [{"review": "the film"}])
    checkpoint = ("--ckpt_path", own.run / "checkpoints" / "best.ckpt")
    outcome = again("predict", file, *checkpoint, weights=False)
    assert outcome.code == 1
    assert "has no column 'stars', so its classes are unknown: name the fine-tuned model" in outcome.err


def test_regression_by_another_metric_and_a_pair_of_columns(tiny, lightning, tmp_path):
    rows = [row | {"title": "the film", "stars": list(STARS).index(row["stars"]) / 2} for row in reviews(60, 5)]
    write(tmp_path / "reviews.csv", rows)
    named = ["--data.source", "reviews.csv", "--data.text", "[title, review]", "--data.label", "stars"]
    words = ["--config", CONF, *named, "--model.pretrained", tiny.model, "--data.regression", "true", *TINY]
    outcome = lightning(tmp_path, None, "fit", *words, "--model.metric", "mae", "--trainer.logger", "false", *QUICK)
    assert outcome.code == 0, outcome.err
    assert outcome.results["metric"] == "mae"
    assert AutoConfig.from_pretrained(outcome.run / "model").num_labels == 1
    wrong = lightning(tmp_path, None, "fit", *words, "--model.metric", "f1")
    assert wrong.code == 1
    assert "unknown regression metric 'f1'" in wrong.err


def test_a_metric_that_is_better_when_smaller_keeps_the_smallest(tiny, lightning, tmp_path):
    rows = [row | {"stars": list(STARS).index(row["stars"])} for row in reviews(40, 6)]
    write(tmp_path / "reviews.csv", rows)
    named = ["--data.source", "reviews.csv", "--data.text", "review", "--data.label", "stars", "--model.metric", "mse"]
    words = ["--config", CONF, *named, "--model.pretrained", tiny.model, "--data.regression", "true", *TINY]
    outcome = lightning(tmp_path, None, "fit", *words, *QUICK, "--stages.expert.epochs", 4, "--trainer.logger", "false")
    assert outcome.code == 0, outcome.err
    kept, last = (
        torch.load(outcome.run / "checkpoints" / f"{name}.ckpt", weights_only=True)["lte"]["measured"]["hard"]["mse"]
        for name in ("best", "last")
    )
    assert outcome.results["hard"] == kept <= last


def test_a_test_says_that_every_row_was_taken_for_one_class(again, own, tmp_path):
    same = [{"review": "the film", "stars": stars} for stars in STARS]
    outcome = again("test", write(tmp_path / "same.csv", same), "--data.holdout", 0)
    assert outcome.code == 0, outcome.err
    (taken,) = {name for row in json.loads(outcome.written.read_text())["confusion_matrix"].values() for name in row}
    assert f"test: every row was taken for class '{taken}'." in " ".join(outcome.out.split())
    assert "every row was taken" not in own.out


@pytest.mark.filterwarnings("ignore:The variance of predictions")  # torchmetrics says so, too
def test_a_fit_says_that_a_correlation_is_not_defined(lightning, tiny, tmp_path):
    write(tmp_path / "same.csv", [{"text": "the film", "label": number / 2} for number in range(24)])
    words = ["--config", CONF, "--data.source", "same.csv", "--data.regression", "true", *TINY]
    stages = [word for stage in ("dense", "router", "expert") for word in (f"--stages.{stage}.epochs", 1)]
    words += ["--model.pretrained", tiny.model, "--trainer.logger", "false"]
    outcome = lightning(tmp_path, None, "fit", *words, *stages)
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert outcome.results["hard"] is None
    assert "hard, after adaptation: pearson is not defined, because all predictions or all labels are equal." in said

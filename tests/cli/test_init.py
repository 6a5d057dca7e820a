"""`lte init`: what it writes parses, says what it saw, and fits."""

import csv
import json

import pytest
import yaml

from .conftest import ANIMALS, BAD, FILLERS, GOOD

STARS = {"bad": BAD[0], "fine": GOOD[2], "good": GOOD[0]}


@pytest.fixture
def init(lightning, tmp_path, tiny, tiny_lm):
    """`init(data, *options, lm=False)`: the outcome and the configuration."""

    def run(data, *options, lm=False):
        model = ["--model", (tiny_lm if lm else tiny).model]
        outcome = lightning(tmp_path, None, "init", "new", data, *model, *options)
        file = tmp_path / "new" / "config.yaml"
        return outcome, yaml.safe_load(file.read_text()) if file.exists() else None

    return run


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(label=lambda i, stars: stars, name="stars"):
    rows = [(list(STARS)[i % 3], i) for i in range(60)]
    return [
        {"number": i, "body": f"{' '.join(FILLERS[: 1 + i % 6])} {STARS[stars]}", name: label(i, stars)}
        for stars, i in rows
    ]


QUICK = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false"]


def test_a_classifier_from_a_csv_is_ready_to_run(init, lightning, tmp_path):
    outcome, config = init(write_csv(tmp_path / "reviews.csv", reviews()))
    assert outcome.code == 0, outcome.err
    data = config["data"]["init_args"]
    assert (data["text"], data["label"], data["regression"]) == ("body", "stars", False)
    assert data["max_length"] == 16
    assert '# 3 classes: "bad" 18 rows, "fine" 18 rows, "good" 18 rows\n' in outcome.out
    assert "the longest has 9; 0.0 % are longer" in outcome.out
    assert outcome.out.endswith("lightning fit --config new/config.yaml\n")
    fit = lightning(tmp_path, None, "fit", "--config", "new/config.yaml", *QUICK)
    assert fit.code == 0, fit.err
    assert fit.results["metric"] == "accuracy"


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("Sentiment", lambda i, stars: stars, ("Sentiment", False)),
        ("of what kind", lambda i, stars: stars, ("of what kind", False)),
        ("score", lambda i, stars: i / 7, ("score", True)),
        ("score", lambda i, stars: list(STARS).index(stars) + 1, ("score", False)),
    ],
)
def test_the_label_is_found_by_its_name_or_by_its_few_values(init, tmp_path, name, label, expected):
    outcome, config = init(write_csv(tmp_path / "reviews.csv", reviews(label, name)))
    assert outcome.code == 0, outcome.err
    found = config["data"]["init_args"]
    assert (found["label"], found["regression"], found["text"]) == (*expected, "body")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "cat"}]},
        {"instruction": "say", "input": "", "output": "cat"},
        {"prompt": "say", "completion": "cat"},
    ],
)
def test_chats_are_known_by_their_columns(init, lightning, tmp_path, row):
    outcome, config = init(write_jsonl(tmp_path / "chats.jsonl", [row] * 20), lm=True)
    assert outcome.code == 0, outcome.err
    assert config["model"]["class_path"] == "lte_lightning.tasks.Generation"
    assert config["data"]["init_args"]["columns"] == list(row)
    fit = lightning(tmp_path, None, "fit", "--config", "new/config.yaml", *QUICK, "--trainer.fast_dev_run", "true")
    assert fit.code == 0, fit.err


def test_short_chats_leave_room_for_answers(init, lightning, tmp_path):
    file = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "say", "completion": animal} for animal in ANIMALS] * 4)
    outcome, config = init(file, lm=True)
    assert config["data"]["init_args"]["max_length"] == 116
    assert "max_length: 116 # with room for 100 new tokens (max_new_tokens)\n" in outcome.out
    fit = lightning(tmp_path, None, "fit", "--config", "new/config.yaml", *QUICK)
    assert fit.code == 0, fit.err
    weights = ["--config", fit.run, "--model.init_from", fit.run / "model"]
    answers = lightning(tmp_path, None, "predict", *weights, "--data.source", file)
    assert answers.code == 0, answers.err
    assert "prediction" in answers.written.read_text()


def test_prompts_and_answers_of_other_names_are_named(init, tmp_path):
    rows = [{"question": f"say cat {number}", "reply": "cat"} for number in range(20)]
    outcome, config = init(write_jsonl(tmp_path / "asked.jsonl", rows), lm=True)
    assert (
        "for prompts and answers set --task chat, and name their columns by --text and --label" in outcome.err.lower()
    )
    assert config is None
    named = ("--task", "chat", "--text", "question", "--label", "reply")
    outcome, config = init(tmp_path / "asked.jsonl", *named, lm=True)
    assert outcome.code == 0, outcome.err
    assert config["data"]["init_args"]["columns"] == ["question", "reply"]


def test_a_file_without_a_row_of_names_is_told(init, tmp_path):
    write_csv(tmp_path / "named.csv", reviews())
    lines = (tmp_path / "named.csv").read_text().splitlines(keepends=True)
    (tmp_path / "bare.csv").write_text("".join(lines[1:]))
    outcome, _ = init(tmp_path / "bare.csv", "--label", "bad")
    assert outcome.code == 0, outcome.err
    assert "# ATTENTION: the name of this column is one of its classes." in outcome.out


def test_a_folder_of_tables_without_splits_is_no_running_text(init, tmp_path):
    (tmp_path / "set").mkdir()
    write_csv(tmp_path / "set" / "reviews.csv", reviews())
    outcome, config = init("set")
    assert "set has no train.jsonl, or .json, .csv, .tsv, .parquet; it has reviews.csv: name that" in outcome.err
    assert config is None
    outcome, config = init("set", "--task", "text", "--text", "body", lm=True)
    assert outcome.code == 0, outcome.err


def test_a_folder_of_notes_is_running_text(init, lightning, tmp_path):
    (tmp_path / "notes").mkdir()
    for animal in ANIMALS:
        (tmp_path / "notes" / f"{animal}.md").write_text(f"the {animal} eats.\n" * 40)
    outcome, config = init("notes", lm=True)
    assert outcome.code == 0, outcome.err
    assert config["data"]["init_args"]["documents"] == "whole"
    assert "tokens to train on" in outcome.out
    fit = lightning(tmp_path, None, "fit", "--config", "new/config.yaml", *QUICK, "--trainer.fast_dev_run", "true")
    assert fit.code == 0, fit.err


def test_a_full_disk_is_one_line_and_leaves_no_file(init, no_file_larger_than, tmp_path):
    file = write_csv(tmp_path / "reviews.csv", reviews())
    init(file)
    whole = (tmp_path / "new" / "config.yaml").read_bytes()
    (tmp_path / "new" / "config.yaml").unlink()
    with no_file_larger_than(len(whole) - 1):
        outcome, written = init(file)
    assert (outcome.code, written) == (1, None)
    assert outcome.err.splitlines()[-1] == f"error: cannot write {tmp_path}/new/config.yaml: File too large"
    assert not list((tmp_path / "new").iterdir())


def test_nothing_is_overwritten(init, tmp_path):
    file = write_csv(tmp_path / "reviews.csv", reviews())
    init(file)
    before = (tmp_path / "new" / "config.yaml").read_text()
    outcome, _ = init(file, "--label", "number")
    assert outcome.code == 1
    assert "new/config.yaml exists already" in outcome.err
    assert (tmp_path / "new" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            reviews(lambda i, stars: f"{stars} {i}"),
            (),
            "60 of 60 classes have one row only",
        ),
        (
            [{"a": f"text {i}", "b": f"more {i}"} for i in range(9)],
            (),
            "no column looks like class labels: set --la",
        ),
        ([{"a": "text", "b": "more"}], (), r"in the only row \(JSON is a list of objects"),
        (reviews(), ("--label", "star"), r"no column 'star' \(do you mean 'stars'"),
        (reviews(), ("--task", "chat"), "is an encoder .bert., which writes no text"),
        (reviews(), ("--task", "chats"), "Got value: chats"),
    ],
)
def test_what_a_fit_would_refuse_is_refused_and_nothing_written(init, tmp_path, rows, options, message):
    import re

    outcome, config = init(write_csv(tmp_path / "reviews.csv", rows), *options)
    assert outcome.code in (1, 2)
    assert config is None
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err

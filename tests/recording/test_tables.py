import io
import json

import pytest
from rich.console import Console

from lte_lightning.core.model.config import LteConfig
from lte_lightning.errors import UserError
from lte_lightning.recording.tables import read_floor, results_table, warn_of_missed_target
from lte_lightning.results import Results

RESULTS = {
    "task": "sst2",
    "metric": "accuracy",
    "dense": 0.9,
    "soft": 0.89,
    "hard_before": 0.85,
    "hard": 0.88,
    "sparsity": 0.8,
    "sparsity_before": 0.75,
    "data": "my/folder",
    "sparsity_per_layer": [0.7, 0.9],
    "flops_per_token": 3 * 2**30,
    "dense_flops_per_token": 10 * 2**30,
    "bytes_per_token": 4 * 10**6,
    "dense_bytes_per_token": 10**7,
    "bound": 2.5,
    "seconds_per_stage": {"dense": 12.3, "grouping": 1.0},
    "seed": 0,
}


def span_kept(results):
    nothing = {"hard_before": None, "hard": None, "seconds_per_stage": {}}
    return Results.of(RESULTS | nothing | results).span_kept


def text_of(results):
    stream = io.StringIO()
    Console(file=stream, width=100).print(results_table(Results.of(results)))
    return stream.getvalue()


def row(text, label):
    (line,) = (line for line in text.splitlines() if f"│ {label}" in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_table():
    text = text_of(RESULTS)
    assert row(text, "dense") == ["0.9000", "0.0 %", "10.0000", "10.000", "1.00x"]
    assert row(text, "hard, before adaptation") == ["0.8500", "75.0 %", "", "", ""]
    assert row(text, "hard, after adaptation") == ["0.8800", "80.0 %", "3.0000", "4.000", "2.50x"]
    for words in ("Data: my/folder.", "FLOPs saved: 70.0 %", "2^30", "dense 12 s, grouping 1 s"):
        assert words in text
    assert "floor" not in text


@pytest.mark.parametrize(("reached", "missed"), [(0.791, False), (0.809, False), (0.785, True), (0.83, True)])
def test_a_target_that_was_missed_by_more_than_a_point_is_said(reached, missed, caplog):
    results = Results.of(RESULTS | {"target_sparsity": 0.8, "sparsity": reached})
    said = warn_of_missed_target(results, LteConfig(target_sparsity=0.8))
    assert (said is not None) == missed == bool(caplog.records)
    if missed:
        wanted = f"80.0 % sparsity was asked for, {100 * reached:.1f} % reached"
        assert wanted in said
        assert "lte calibrate RUN --sparsity 0.8" in said
        assert said in caplog.text
        assert results_table(results, said).caption.splitlines()[-2] == said


def test_without_a_target_nothing_is_missed():
    assert warn_of_missed_target(Results.of(RESULTS), LteConfig()) is None


def test_of_a_selector_without_a_threshold_no_knob_is_promised():
    results = Results.of(RESULTS | {"target_sparsity": 0.5})
    said = warn_of_missed_target(results, LteConfig(selector="narrow", target_sparsity=0.5))
    assert "calibrate" not in said
    assert "fit again with another target_sparsity" in said


def test_table_of_a_fit_without_adaptation():
    text = text_of(RESULTS | {"hard": None})
    assert row(text, "hard, before adaptation") == ["0.8500", "80.0 %", "3.0000", "4.000", "2.50x"]
    assert "after adaptation" not in text


def test_table_of_a_dense_fit():
    nothing = dict.fromkeys(("soft", "hard_before", "hard", "sparsity", "sparsity_per_layer"))
    assert "saved" not in text_of(RESULTS | nothing)


def test_table_with_the_floor():
    text = text_of(RESULTS | {"floor": 0.8})
    assert row(text, "floor: no expert at all")[:2] == ["0.8000", "100.0 %"]
    assert "Of the span from the floor to the dense start 80 % is kept" in text


@pytest.mark.parametrize(
    ("dense", "hard", "floor", "kept"),
    [(0.9, 0.88, 0.8, 0.8), (0.9, 0.8, 0.8, 0.0), (0.8, 0.8, 0.85, None), (None, 0.8, 0.7, None)],
)
def test_span_kept(dense, hard, floor, kept):
    assert span_kept({"metric": "accuracy", "dense": dense, "hard": hard, "floor": floor}) == (
        kept if kept is None else pytest.approx(kept)
    )


@pytest.mark.parametrize(("dense", "hard", "floor", "kept"), [(10.0, 12.0, 20.0, 0.8), (10.0, 12.0, 9.0, None)])
def test_span_kept_where_lower_is_better(dense, hard, floor, kept):
    found = span_kept({"metric": "perplexity", "dense": dense, "hard": hard, "floor": floor})
    assert found == (kept if kept is None else pytest.approx(kept))


@pytest.mark.parametrize(("stages", "kept"), [(["router"], 0.5), (["router", "expert"], None)])
def test_span_kept_by_a_fit_without_an_adaptation_is_that_before_it(stages, kept):
    """With one, ``hard`` is None where it is not defined."""
    results = {"metric": "accuracy", "dense": 0.9, "hard": None, "hard_before": 0.75, "floor": 0.6}
    found = span_kept(results | {"seconds_per_stage": dict.fromkeys(stages, 1.0)})
    assert found == (kept if kept is None else pytest.approx(kept))


def test_floor_of_another_run(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"floor": 0.7, "task": "cola", "hard": 0.7}))
    found = read_floor(tmp_path / "results.json")
    assert (found.floor, found.task) == (0.7, "cola")
    (tmp_path / "other.json").write_text(json.dumps(RESULTS | {"hard": 0.7}))
    for name in ("other.json", "none.json"):
        with pytest.raises(UserError, match=f"{name} gives no floor"):
            read_floor(tmp_path / name)

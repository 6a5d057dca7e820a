"""Which fits of a folder a sweep takes for its own, however its command was typed."""

import json
import shlex
import shutil

import pytest

from lte_lightning.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.recall import Remembered, recognise
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.table import write_tables

ETA = "model.efficiency_weight"
BOTH = {"A": {"grid": {ETA: [0.1]}}, "B": {"grid": {ETA: [0.2]}}}


def all_points(trial, swept, *args, **more):
    """The points that the tables of a sweep hold, and how many finished fits they do not."""
    sweep = recognise(read_sweep(trial.file, *args, **more), swept.folder)
    mine = sweep.points()
    others, count = Remembered(swept.folder, sweep).matching(mine)
    return mine + others, count


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"data.source": "rows"}, {"data.source": "rows/"}),
        ({"data.source": "rows/"}, {"data.source": "rows"}),
        ({"trainer.enable_progress_bar": False}, {}),
        ({}, {"trainer.logger": False, "trainer.enable_progress_bar": False}),
        ({"data.train_rows": "100"}, {"data.train_rows": 100}),
        ({"stages.expert.learning_rate": "1e-4"}, {"stages.expert.learning_rate": 0.0001}),
        ({"model.separability_weight": 1.0}, {"model.separability_weight": "1"}),
        # a stage that is skipped may have any rate
        ({"stages.dense.learning_rate": 1e-4, "stages.dense.epochs": 0}, {"stages.dense.epochs": 0}),
    ],
)
def test_what_changes_no_figure_changes_no_fit(before, now, bench):
    trial = bench(start={}, floor={}, variants=BOTH, seeds=[0, 1])
    first = trial.run(extra=before)
    points = read_sweep(trial.file, now).points()
    assert not {point.name for point in points} & first.engine.points.keys()  # the names alone would do all of it again
    assert {point.identity for point in points} == {point.identity for point in first.engine.points.values()}
    again = trial.run(extra=now)
    assert again.said == ["8 of 8 points are done already."]
    assert again.engine.points.keys() == first.engine.points.keys()
    points, left_out = all_points(trial, again, now)
    assert (len(points), left_out) == (8, 0)


def test_a_whole_number_of_batches_is_no_share_of_them(bench):
    trial = bench(overrides={"trainer.limit_train_batches": 1.0})
    trial.run()
    trial.content["overrides"] = {"trainer.limit_train_batches": 1}
    with pytest.raises(UserError, match=r"other options: trainer\.limit_train_batches 1\.0, now 1; use those"):
        trial.run()


def test_a_point_is_stored_whole(bench):
    """What is read back is what was run: of the start, the floor, the points, and of the plan."""
    options = {"data.files": ["a", "b"], "model.lte": {"selector": "router"}, "data.cut": None, "data.rate": 1e-5}
    trial = bench(start={}, floor={}, variants=BOTH, overrides=options, seeds=[0, 1])
    swept = trial.run()
    points = swept.engine.points
    assert {name: record.point for name, record in swept.folder.records().items()} == points
    again = SweepFolder(swept.folder.path)
    with again.hold(read_sweep(trial.file)):
        again.plan(list(points.values()))
    assert again.planned() == points
    assert len({point.identity for point in points.values()}) == len(points)


def forget(folder):
    """Makes a folder one of an earlier version, which kept neither configs nor options."""
    for file in folder.points.glob("*.json"):
        kept = {"configs", "overrides", "identity"}
        file.write_text(json.dumps({key: v for key, v in json.loads(file.read_text()).items() if key not in kept}))
    about = folder.path / "sweep.json"
    known = json.loads(about.read_text())
    names = [point["name"] for point in known.pop("plan", [])]
    about.write_text(json.dumps(known | {"planned": names, "commands": [{"command": "lte sweep trial.yaml"}]}))


def test_a_folder_of_an_earlier_version_is_gone_on_with(bench):
    """By what its points are made of: the sweep's file, their variant, parameters and seed, and the same options."""
    trial = bench(start={}, floor={}, variants=BOTH, seeds=[0, 1])
    first = trial.run(extra={"data.source": "rows"})
    forget(first.folder)
    again = trial.run(extra={"data.source": "rows", "trainer.logger": False}, seeds=[0])
    assert again.said == ["4 of 4 points are done already."]
    points, left_out = all_points(trial, again, {"data.source": "rows"}, seeds=[0])
    assert ({point.name for point in points}, left_out) == (first.engine.points.keys(), 0)
    assert all(point.identity for point in points)
    # from now on its points are whole, those of seed 0
    whole = [record.point.identity != "" for record in again.folder.records().values()]
    assert (sum(whole), len(whole)) == (4, 8)
    assert trial.run(extra={"data.source": "rows/"}, seeds=[0]).said == ["4 of 4 points are done already."]


def test_a_folder_of_an_earlier_version_with_other_options_is_refused(bench):
    trial = bench(start={}, variants=BOTH)
    first = trial.run(extra={"data.source": "rows"})
    forget(first.folder)
    before = {file: file.read_bytes() for file in first.folder.path.rglob("*") if file.is_file()}
    message = (
        r"3 finished fits in .*trial belong to other options: an earlier version kept their names alone, .*; go on "
        r"with 'lte sweep trial\.yaml', or choose another --folder"
    )
    with pytest.raises(UserError, match=message):
        trial.run(extra={"data.source": "others"})
    assert {file: file.read_bytes() for file in first.folder.path.rglob("*") if file.is_file()} == before


def test_starts_of_an_earlier_version_that_may_differ_are_not_averaged(bench):
    variants = {"LTE": {}, "MoEfication": {"start": {"overrides": {"model.activation": "relu"}}}}
    trial = bench(seeds=[0, 1], start={}, variants=variants)
    swept = trial.run()
    forget(swept.folder)
    points = [record.point for record in swept.folder.records().values()]
    lines = write_tables(swept.folder, points)[1].read_text().splitlines()
    starts = [line.split("|")[3].strip() for line in lines if "start (" in line]
    assert sorted(starts) == sorted(f"start ({point.name})" for point in points if point.role == "start")


def test_a_fit_that_was_killed_is_recognised_too(bench, tmp_path):
    trial = bench(overrides={"data.stop": "true"})
    ((name, _),) = trial.run(extra={"data.source": "rows"}).summary.failed.items()
    (tmp_path / "mended").touch()
    swept = trial.run(extra={"data.source": "rows/"})
    assert swept.summary.done == [name]
    assert "resumed" in swept.folder.log(name).read_text()


def test_what_may_change_a_figure_is_another_fit(bench):
    trial = bench(start={}, variants=BOTH, overrides={"data.train_rows": 10})
    first = trial.run()
    before = sorted(first.folder.path.rglob("*"))
    for content, extra, message in (
        ({"data.train_rows": 10}, {"data.source": "rows"}, "data.source unset, now rows"),
        ({"data.train_rows": 1000}, {}, "data.train_rows 10, now 1000"),
        (
            {"data.train_rows": 10},
            {"stages.expert.learning_rate": 1e-4},
            "stages.expert.learning_rate unset, now 0.0001",
        ),
    ):
        trial.content["overrides"] = content
        match = rf"3 finished fits in .*trial belong to other options: {message}; use those, or choose another --folder"
        with pytest.raises(UserError, match=match):
            trial.run(extra=extra)
    assert sorted(first.folder.path.rglob("*")) == before


def test_fits_of_other_options_are_left_out_of_the_tables(bench):
    trial = bench(start={}, variants=BOTH)
    first = trial.run()
    trial.content["variants"] = BOTH | {"B": BOTH["B"] | {"overrides": {"model.separability_weight": 1}}}
    swept = trial.run()
    assert len(swept.summary.done) == 3
    points, left_out = all_points(trial, swept)
    assert left_out == 1
    (dropped,) = {p.name for p in first.engine.points.values()} - {p.name for p in points}
    assert dropped.startswith("B-")
    text = write_tables(swept.folder, points)[1].read_text()
    assert text.count("| B |") == text.count("| A |") == 1


def test_a_floor_that_is_added_is_run_alone(bench):
    """It is reported beside fits that were done before."""
    trial = bench(start={}, variants=BOTH)
    first = trial.run()
    trial.content["floor"] = {}
    swept = trial.run()
    assert swept.said[0] == "3 of 4 points are done already."
    points, left_out = all_points(trial, swept)
    assert (len(points), left_out) == (4, 0)
    assert first.engine.points.keys() < {point.name for point in points}
    table = write_tables(swept.folder, points)[1].read_text()
    (line,) = (line for line in table.splitlines() if "| A |" in line)
    assert line.split("|")[9].strip() == "0.5000"


def test_the_tables_hold_what_was_not_chosen_this_time(bench):
    trial = bench(start={}, variants=BOTH)
    trial.run(seeds=[0])
    swept = trial.run(seeds=[1])
    assert len(swept.summary.done) == 3
    trial.content["variants"] = {"B": BOTH["B"]}  # A is named no more, and stays
    points, left_out = all_points(trial, swept, seeds=[1])
    assert left_out == 0
    assert sorted(p.name.rsplit("-", 1)[0] for p in points) == [
        *("A-efficiency_weight=0.1-s0", "A-efficiency_weight=0.1-s1"),
        *("B-efficiency_weight=0.2-s0", "B-efficiency_weight=0.2-s1", "start-s0", "start-s1"),
    ]
    rows = write_tables(swept.folder, points)[1].read_text()
    assert "| B | 0.2 | 1, 0 |" in rows or "| B | 0.2 | 0, 1 |" in rows


def test_a_search_that_goes_on_keeps_its_trials_in_the_tables(bench):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install optuna")
    search = {"trials": 2, "parameters": {ETA: {"low": 0.1, "high": 1.0}}, "objectives": {"hard": "maximize"}}
    trial = bench(start={}, search=search)
    first = trial.run()
    trial.content["search"] = search | {"trials": 3}
    swept = trial.run()
    points, left_out = all_points(trial, swept)
    assert (len(points), left_out) == (1 + 3, 0)
    assert first.engine.points.keys() < {point.name for point in points}


def test_two_points_that_only_look_alike_are_two(bench):
    trial = bench(variants={"a": {"grid": {"trainer.logger": [True, False]}}})
    assert len(trial.run().summary.done) == 2
    again = trial.run()
    assert again.said == ["2 of 2 points are done already."]


def test_a_folder_is_one_sweep_s(bench, tmp_path):
    trial = bench(about="first", grid={ETA: [0.5]})
    trial.run()
    folder, about = SweepFolder(tmp_path / "runs" / "trial"), tmp_path / "runs" / "trial" / "sweep.json"
    before = about.read_text()
    assert (about.parent / "sweep.yaml").read_text() == trial.file.read_text()

    def hold(file, **more):
        with folder.hold(read_sweep(file), **more):
            return json.loads(about.read_text())

    (tmp_path / "other.yaml").write_text("configs: [base.yaml]\nabout: second\n")
    with pytest.raises(UserError, match=r"trial belongs to the sweep 'trial', not to .*other\.yaml; choose another"):
        hold(tmp_path / "other.yaml")
    (tmp_path / "sub").mkdir()
    for name in ("base.yaml", "other.yaml"):
        shutil.copy(tmp_path / name, tmp_path / "sub" / name)
    (tmp_path / "sub" / "other.yaml").rename(tmp_path / "sub" / "trial.yaml")
    with pytest.raises(UserError, match=r"belongs to the sweep .*/trial\.yaml, not to .*sub/trial\.yaml; choose"):
        hold(tmp_path / "sub" / "trial.yaml")
    assert about.read_text() == before
    # a sweep that moved is the same
    shutil.move(trial.file, tmp_path / "sub" / "trial.yaml")
    words = ["lte", "sweep", "sub/trial.yaml", "--data.source", "my rows"]
    for _ in range(2):
        found = hold(tmp_path / "sub" / "trial.yaml", words=words)
    assert found["file"] == str(tmp_path / "sub" / "trial.yaml")
    (command,) = found["commands"]
    assert (shlex.split(command["command"]), command["folder"]) == (words, str(tmp_path))

"""Points that Optuna proposes: asked, told, resumed, shared."""

import re
import sqlite3
import sys
import threading

import pytest

from lte_lightning.errors import UserError
from lte_lightning.results import Results
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.search import Trials
from lte_lightning.sweep.spec import read_sweep

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install optuna")

ETA = "model.efficiency_weight"
SEARCH = {
    "trials": 6,
    "parameters": {
        ETA: {"low": 0.05, "high": 2.0, "log": True},
        "model.lte.expert_size": {"choices": [8, 16]},
        "stages.router.epochs": {"low": 1, "high": 3},
    },
    "objectives": {"hard": "maximize", "sparsity": "maximize"},
}


def study_of(swept):
    return swept.engine.trials.study


def results_of(hard, sparsity):
    """The results of a fit."""
    cost = {"flops_per_token": 1, "dense_flops_per_token": 2, "sparsity_per_layer": [sparsity], "dense": 0.9}
    views = {"task": "sst2", "metric": "accuracy", "hard_before": None, "hard": hard, "sparsity": sparsity, "seed": 0}
    return Results.of(cost | views)


def test_trials_are_run_told_and_not_repeated(bench, tmp_path):
    trial = bench(start={}, seeds=[0, 1], search=SEARCH)
    swept = trial.run(workers=2)
    assert (len(swept.summary.done), swept.summary.failed) == (2 + 6 * 2, {})
    trials = study_of(swept).get_trials()
    assert [one.state.name for one in trials] == ["COMPLETE"] * 6
    for one in trials:
        eta = one.params[ETA]
        assert 0.05 <= eta <= 2.0
        assert one.params["model.lte.expert_size"] in (8, 16)
        assert one.params["stages.router.epochs"] in (1, 2, 3)
        # the stand-in's, over the seeds
        assert one.values == pytest.approx([0.9 - eta / 10 + 0.005, eta / (1 + eta)])
    points = [point for point in swept.engine.points.values() if point.role == "point"]
    assert all(point.start and point.overrides["stages.dense.epochs"] == 0 for point in points)
    front = swept.engine.trials.write_front(tmp_path / "front.md").read_text().splitlines()
    assert (
        front[0]
        == "| trial | model.efficiency_weight | model.lte.expert_size | stages.router.epochs | hard | sparsity |"
    )
    assert len(front) == 2 + 6  # more sparsity is less quality: no trial beats another
    again = trial.run()
    assert (len(again.summary.done), again.said) == (2, ["2 of 2 points are done already."])
    trial.content["search"] = SEARCH | {"trials": 7}
    assert len(trial.run().summary.done) == 2 + 2


def test_a_trial_like_one_that_runs_is_told_the_same(bench, tmp_path):
    """They wait for it, also in a sweep that goes on after it was killed; if it fails, they do."""
    trial = bench(search=SEARCH | {"parameters": {ETA: {"choices": [0.2, 0.8]}}})
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        for _ in range(2):
            trials = Trials(sweep, folder)
            (one,), (other,) = trials.ask(), trials.ask()
            assert trials.ask() == []  # the other four are like these
            assert [trial.state.name for trial in trials.study.get_trials()] == ["RUNNING"] * 6
        assert trials.tell(one.name, results_of(0.5, 0.25)) == []
        said = trials.tell(other.name, None)
    found = [(trial.params, trial.values) for trial in trials.study.get_trials()]
    assert {one.parameters[ETA], other.parameters[ETA]} == {0.2, 0.8}
    assert all(values == ([0.5, 0.25] if params == one.parameters else None) for params, values in found)
    failed = [trial.number for trial in trials.study.get_trials() if trial.state.name == "FAIL"]
    assert said == [f"trial {twin} failed: it is the same as trial {failed[0]}" for twin in failed[1:]]
    assert 0 < len(said) < 4  # so that there were twins of both


def test_a_failed_trial_is_told_and_counts(bench):
    parameters = {ETA: {"low": 0.1, "high": 1.0}, "data.fail": {"choices": ["true"]}}
    swept = bench(search=SEARCH | {"trials": 3, "parameters": parameters}).run()
    assert len(swept.summary.failed) == 3
    assert [one.state.name for one in study_of(swept).get_trials()] == ["FAIL"] * 3


def test_a_trial_left_by_a_killed_sweep_is_taken_up(bench, tmp_path):
    trial = bench(search=SEARCH, seeds=[0])
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        left = Trials(sweep, folder).ask()
    swept = trial.run()
    assert left[0].name in swept.summary.done
    assert [one.state.name for one in study_of(swept).get_trials()] == ["COMPLETE"] * 6


def test_two_sweeps_share_a_study_and_its_number_of_trials(bench, tmp_path):
    shared = SEARCH | {"storage": f"sqlite:///{tmp_path / 'shared.db'}", "study": "both"}
    trial = bench(search=shared, seeds=[0])
    sweep = read_sweep(trial.file)
    other = SweepFolder(tmp_path / "runs" / "other")
    with other.hold(sweep):
        theirs = Trials(sweep, other)
        (elsewhere,) = theirs.ask()
        swept = trial.run()
        assert len(swept.summary.done) == 5
        assert elsewhere.name not in swept.engine.points
        assert theirs.ask() == []
        theirs.tell(elsewhere.name, results_of(0.5, 0.5))
    states = [one.state.name for one in study_of(swept).get_trials()]
    assert states == ["COMPLETE"] * 6


def test_folders_of_the_same_path_on_two_machines_share_a_study(bench, tmp_path):
    """Each runs its own trials: neither takes up what the other is at, and both know their own again."""
    shared = SEARCH | {"storage": f"sqlite:///{tmp_path / 'shared.db'}"}
    sweep, path = read_sweep(bench(search=shared).file), tmp_path / "runs" / "trial"

    def ask():
        folder = SweepFolder(path)
        with folder.hold(sweep):
            return [point.name for point in Trials(sweep, folder).ask()]

    here = ask()
    path.rename(tmp_path / "disk of the first")
    there = ask()
    assert there != here
    assert ask() == there
    path.rename(tmp_path / "disk of the second")
    (tmp_path / "disk of the first").rename(path)
    assert ask() == here


def test_a_folder_of_an_earlier_version_knows_its_trials_by_its_path(bench, tmp_path):
    trial = bench(search=SEARCH | {"trials": 2, "storage": f"sqlite:///{tmp_path / 'shared.db'}"})
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        folder.about["id"] = str(folder.path)
        left = Trials(sweep, folder).ask()
        del folder.about["id"]
        folder.save()
    for _ in range(2):  # also when it was started by this version since, and killed again
        again = SweepFolder(folder.path)
        with again.hold(sweep):
            assert Trials(sweep, again).ask() == left
    assert left[0].name in trial.run().summary.done


def test_an_undefined_objective_fails_its_trial_alone(bench):
    """Without an expert stage the stand-in finds nothing for `hard`."""
    parameters = {ETA: {"low": 0.1, "high": 1.0}, "stages.expert.epochs": {"choices": ["0", "1"]}}
    trial = bench(search=SEARCH | {"trials": 6, "parameters": parameters})
    swept = trial.run()
    assert (len(swept.summary.done), swept.summary.failed) == (6, {})
    states = {(one.params["stages.expert.epochs"], one.state.name) for one in study_of(swept).get_trials()}
    assert states == {("0", "FAIL"), ("1", "COMPLETE")}
    failed = sum(one.state.name == "FAIL" for one in study_of(swept).get_trials())
    assert sum("failed: its hard is undefined" in line for line in swept.said) == failed
    assert trial.run().summary.done == []


def test_trials_wait_for_a_start_that_failed(bench, tmp_path):
    """They are not judged by it: when it is there, they are run."""
    trial = bench(start={"overrides": {"data.fail": "true"}}, search=SEARCH | {"trials": 3})
    swept = trial.run(workers=2)
    assert (len(swept.summary.failed), swept.summary.done) == (1, [])
    assert {one.state.name for one in study_of(swept).get_trials()} <= {"RUNNING"}
    (tmp_path / "mended").touch()
    again = trial.run()
    assert (len(again.summary.done), again.summary.failed, again.summary.blocked) == (1 + 3, {}, [])
    assert [one.state.name for one in study_of(again).get_trials()] == ["COMPLETE"] * 3


def test_trials_of_a_folder_that_was_moved_are_its_own(bench, tmp_path):
    trial = bench(search=SEARCH | {"trials": 3})
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "old")
    with folder.hold(sweep):
        left = Trials(sweep, folder)
        (point,) = left.ask()
        left.study.ask()  # killed before a parameter was drawn
    folder.path.rename(tmp_path / "runs" / "trial")
    swept = trial.run()
    assert point.name in swept.summary.done
    assert [one.state.name for one in study_of(swept).get_trials()] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("step", ["ask", "tell", "fits_left"])
def test_a_storage_that_is_locked_for_a_while_is_waited_for(step, bench, tmp_path):
    """By another process, in the middle of a search; one that stays locked is an error, and nothing is lost."""
    file = tmp_path / "study.db"
    trial = bench(search=SEARCH | {"trials": 2, "storage": f"sqlite:///{file}?timeout=0"})
    sweep, folder = read_sweep(trial.file), SweepFolder(tmp_path / "runs" / "trial")
    with folder.hold(sweep):
        trials = Trials(sweep, folder)
        (point,) = trials.ask()
        results = results_of(0.5, 0.5)
        call = {"ask": trials.ask, "tell": lambda: trials.tell(point.name, results), "fits_left": trials.fits_left}[
            step
        ]
        database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        database.execute("BEGIN EXCLUSIVE")
        trials.patience = 0
        with pytest.raises(UserError, match=r"database is locked.*Nothing is lost: wait for it and start the sweep"):
            call()
        trials.patience = 60
        timer = threading.Timer(1.5, database.close)  # which gives the lock back
        timer.start()
        call()
        timer.join()
        if step != "tell":
            trials.tell(point.name, results)
    swept = trial.run()
    assert [one.state.name for one in study_of(swept).get_trials()] == ["COMPLETE"] * 2


@pytest.mark.parametrize(
    ("storage", "shown", "hint"),
    [
        ("postgresql+psycopg://me:SECRET@host/db", "postgresql+psycopg://***@host/db", "install the driver"),
        ("postgresql+psycopg://me:p@SEC:SECRET@host/db", "postgresql+psycopg://***@host/db", "check storage"),
        ("nonsense://host/db?user=me&password=SECRET", "nonsense://host/db?***", "check storage"),
        ("postgresql:/me:SECRET@host/db", "postgresql:/***@host/db", "check storage"),
        ("me:SECRET@host/db", "me:***@host/db", "check storage"),
        ("sqlite:////not/there?timeout=0", "sqlite:////not/there?timeout=0", "is it locked by another process"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(
    storage, shown, hint, bench, tmp_path, monkeypatch
):
    """Only what may pass is said to be locked, perhaps."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    sweep = read_sweep(bench(search=SEARCH | {"storage": storage}).file)
    with pytest.raises(UserError, match=re.escape(f"Optuna's storage {shown} cannot be used: ")) as caught:
        Trials(sweep, SweepFolder(tmp_path / "new"), patience=0)
    message = str(caught.value)
    assert "SECRET" not in message
    assert f"; {hint}" in message
    assert ("locked" in message) == ("locked" in hint)


def test_bad_searches(bench, tmp_path, monkeypatch):
    bench(search=SEARCH | {"trials": 1}).run()
    with pytest.raises(UserError, match=r"study 'trial' in sqlite:.* has other objectives; name another study"):
        bench(search=SEARCH | {"objectives": {"hard": "minimize"}}).run()
    with pytest.raises(UserError, match="Optuna's storage nonsense://x cannot be used"):
        bench(search=SEARCH | {"storage": "nonsense://x"}).run()
    with sqlite3.connect(tmp_path / "locked.db", isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")
        storage = f"sqlite:///{tmp_path / 'locked.db'}?timeout=0"
        sweep, folder = read_sweep(bench(search=SEARCH | {"storage": storage}).file), SweepFolder(tmp_path / "new")
        with pytest.raises(UserError, match="database is locked; is it locked by another process"):
            Trials(sweep, folder, patience=0)
    database.close()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="a search needs Optuna: pip install"):
        bench(search=SEARCH).run()

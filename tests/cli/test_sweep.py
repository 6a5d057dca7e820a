"""`lte sweep` with real fits: what it checks before it runs, and that a killed one goes on as if nothing had been."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lte_lightning.results import Place
from lte_lightning.sweep.command import fit_command
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import OBJECTIVES, read_sweep

from .conftest import results_of

SWEEPS = Path(__file__).parents[2] / "sweeps"
ETA = "model.efficiency_weight"
VIEWS = ("dense", "soft", "hard_before", "hard", "sparsity", "sparsity_per_layer")


def test_points_that_cannot_be_are_found_before_any_is_run(sweep_file, sweep, tmp_path):
    variants = {
        "typo": {"overrides": {"model.efficiency_wieght": 1}},
        "stage": {"overrides": {"stages.rooter.epochs": 1}},
        "good": {},
        "value": {"grid": {ETA: [0.5, -1]}},
    }
    outcome = sweep(sweep_file(variants=variants))
    assert outcome.code == 1
    head, *lines = outcome.err.splitlines()
    assert head.endswith("trial.yaml: 3 fits cannot be run, so none was started")
    assert re.match("typo-s0-.*unknown name 'efficiency_wieght'; did you mean efficiency_weight", lines[1])
    assert re.match("stage-s0-.*unknown option --stages.rooter.epochs; did you mean --stages.router.epochs", lines[0])
    assert re.match("value-efficiency_weight=-1-s0-.*efficiency_weight is -1.0; it must be a finite number", lines[2])
    assert len(lines) == 3
    assert not (tmp_path / "runs").exists()


def test_every_choice_of_a_search_is_looked_at(checked_here, sweep_file, sweep, tmp_path):
    search = {"trials": 9, "parameters": {"model.lte.grouping": {"choices": ["kmeans", "kmaens"]}}}
    outcome = sweep(sweep_file(search=search | {"objectives": {"hard": "maximize"}}))
    assert outcome.code == 1
    assert "1 fit cannot be run, so none was started" in outcome.err
    assert re.search("(?s)\nfit-grouping=kmaens-s0-.*Got value: kmaens", outcome.err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.source"], "--data.source has no value"),
        (["--run.root", "x"], "the command line sets run.root; the sweep sets it itself"),
        (["--only", "nobody"], "no point is called nobody; there are fit-s0"),
        (["--only", "fit", "--only", "nobody"], "no point is called nobody; there are fit-s0"),
        (["--seeds", "0,x"], "--seeds is '0,x'; give whole numbers, such as 0,1,2"),
        (["--workers", "0"], "workers is 0; it must be at least 1"),
    ],
)
def test_a_wrong_command_line(words, message, sweep_file, sweep):
    outcome = sweep(sweep_file(), *words)
    assert outcome.code == 1
    assert message in outcome.err


def test_only_takes_a_name_before_the_file_and_several_after_it(sweep_file, sweep):
    file = sweep_file(variants={"a": {}, "b": {}, "c": {}})
    for words in (("--only", "a", file, "--only", "c"), (file, "--only", "a", "c")):
        outcome = sweep(*words, "--dry-run")
        names = [line.split("-")[0] for line in outcome.out.splitlines() if line.startswith("# ")]
        assert (outcome.code, names) == (0, ["# a", "# c"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"run.json": {"layout": 7}, "results.json": {}},
            "has layout 7, this lte-lightning reads 1; use the version that wrote it",
        ),
        (
            {"run.json": {"layout": 1}, "results.json": {}},
            "results.json is damaged, or was written by another version of lte-lightning",
        ),
        ({"run.json": {"layout": 7}}, "has layout 7"),  # not finished: it would be removed, and done afresh
    ],
)
def test_a_run_of_another_version_is_refused_before_any_is_run(files, message, sweep_file, sweep, tmp_path):
    (point,) = (started := read_sweep(sweep_file())).points()
    run = tmp_path / "runs" / "sweep-trial" / "0123"
    with SweepFolder(run.parent).hold(started):
        pass
    (run / "model").mkdir(parents=True)
    for name, known in files.items():
        (run / name).write_text(json.dumps(known | {"name": point.name}))
    before = sorted(tmp_path.rglob("*"))
    outcome = sweep(sweep_file())
    assert outcome.code == 1
    assert message in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_prints_the_commands_and_leaves_nothing(sweep_file, sweep, tmp_path):
    file = sweep_file(start={}, grid={ETA: [0.2, 0.5]}, seeds=[0, 1])
    before = sorted(tmp_path.iterdir())
    outcome = sweep("--data.batch_size", 4, file, "--dry-run", "--only", "fit-efficiency_weight=0.5")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("lightning fit")]
    assert len(lines) == 2 + 2
    assert all(" --data.batch_size 4 " in line for line in lines)
    assert lines[-1].startswith(f"lightning fit --config {tmp_path}/tiny.yaml --seed_everything 1 --{ETA} 0.5")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_another_sweep_or_of_other_options_is_refused(sweep_file, sweep, tmp_path):
    file = sweep_file(grid={ETA: [0.2, 0.5]})
    refused = sweep(file, "--dry-run", "--" + ETA, 0.3)
    assert refused.code == 1
    assert f"--{ETA} cannot be given for all fits of {file}: its grid or list varies it" in refused.err
    folder = SweepFolder(tmp_path / "runs" / "sweep-trial")
    with folder.hold(read_sweep(file)):
        for point in read_sweep(file).points():
            folder.remember(point, status="done", command=shlex.join(["lightning", *fit_command(point)]))
            run = folder.path / point.name
            run.mkdir()
            (run / "run.json").write_text(json.dumps({"layout": 1, "name": point.name}))
            (run / "results.json").write_text("{}")
    done = sweep(file, "--dry-run", "--trainer.logger", "false")
    assert (done.code, done.out.count(": done\n")) == (0, 2)
    other = sweep(file, "--dry-run", "--data.train_rows", 5)
    assert other.code == 1
    assert "2 finished fits in" in other.err
    assert "belong to other options: data.train_rows unset, now 5; use those, or choose another --folder" in other.err
    file.rename(tmp_path / "renamed.yaml")
    renamed = sweep(tmp_path / "renamed.yaml", "--dry-run", "--folder", "runs/sweep-trial")
    assert renamed.code == 1
    assert "runs/sweep-trial belongs to the sweep 'trial', not to" in renamed.err


def test_a_variant_does_not_bring_those_whose_names_begin_alike(sweep_file, sweep):
    file = sweep_file(variants={"gate": {}, "gated, too": {}, "other": {}})
    outcome = sweep(file, "--dry-run", "--only", "gate", "--only", "oth")
    assert outcome.code == 0, outcome.err
    names = [line.split("-")[0] for line in outcome.out.splitlines() if line.startswith("# ")]
    assert names == ["# gate", "# other"]


def test_the_sweep_itself_needs_no_lightning(sweep_file):
    code = (
        "import sys; from lte_lightning.cli import main; main(['sweep', sys.argv[1], '--dry-run']); "
        "print([m for m in ('lightning', 'mlflow', 'datasets', 'matplotlib', 'optuna', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, sweep_file()], capture_output=True, text=True, timeout=100)
    assert (result.stdout.splitlines()[-1], result.returncode) == ("[]", 0), result.stderr


@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_as_if_nothing_had_been(fits_here, sweep_file, sweep, lightning, tmp_path):
    """Killed in the middle of a start, it goes on from the last epoch; the points are what their commands do."""
    file = sweep_file(epochs=(8, 1, 1), start={}, variants={"LTE": {"list": [{ETA: 0.5}]}})
    words = [sys.executable, "-m", "lte_lightning", "sweep", str(file), "--folder", "runs/killed"]
    process = subprocess.Popen(words, cwd=tmp_path, env=os.environ, start_new_session=True)
    killed = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 200
    while not list(killed.glob("*/checkpoints/last.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert results_of(killed) == {}
    (begun,) = (file.parent for file in killed.glob("*/run.json"))
    place = Place.read(begun)
    assert (place.stage, place.epochs, place.total) == ("dense", 8, 8)
    assert place.epoch == place.done + 1 <= 8
    outcome = sweep(file, "--folder", "runs/killed")
    assert outcome.code == 0, outcome.err
    assert outcome.written == killed / "table.md"
    assert "[2/2] LTE-efficiency_weight=0.5-s0" in outcome.out
    assert re.search(r"LTE-efficiency_weight=0.5-s0-\w+: started\n", outcome.out)
    assert not list(killed.glob("*/progress.json"))
    assert next(killed.glob("points/start*.log")).read_text().count("--ckpt_path") == 1
    found = results_of(killed)
    for name, results in found.items():
        command = shlex.split(json.loads((killed / "points" / f"{name}.json").read_text())["command"])
        assert command[0] == "lightning"
        again = lightning(tmp_path, None, *command[1:], "--run.experiment", f"again-{name}")
        assert again.code == 0, again.err
        assert {key: results[key] for key in VIEWS} == {key: again.results[key] for key in VIEWS}
    start, point = (found[name] for name in sorted(found, reverse=True))
    figures = {key for key, value in point.items() if isinstance(value, int | float)} - {"seed"}
    assert figures <= {*OBJECTIVES}
    assert point["dense"] == start["dense"]
    assert "dense" not in point["seconds_per_stage"]


@pytest.mark.timeout(600)
def test_a_search_by_measured_latency(sweep_file, sweep, tmp_path):
    """Two objectives, one of which the fit measures on the clock."""
    search = {
        "trials": 1,
        "parameters": {ETA: {"low": 0.5, "high": 0.6}},
        "objectives": {"hard": "maximize", "speedup": "maximize"},
    }
    words = (sweep_file(epochs=(0, 1, 1), search=search), "--folder", "runs/fast")
    outcome = sweep(*words)
    assert outcome.code == 1
    assert "objective speedup needs run.latency_rows in overrides: how many rows it is measured on" in outcome.err
    assert not (tmp_path / "runs").exists()
    outcome = sweep(*words, "--run.latency_rows", 2)
    assert outcome.code == 0, outcome.err
    (found,) = results_of(tmp_path / "runs" / "fast").values()
    assert found["speedup"] == found["dense_latency_ms"] / found["latency_ms"] > 0
    assert found["latency_of"]["call"] == "forward pass"
    assert f"| {found['hard']:.4f} | {found['speedup']:.4f} |" in (tmp_path / "runs" / "fast" / "front.md").read_text()
    (log,) = (tmp_path / "runs" / "fast" / "points").glob("*.log")
    assert f"Measured: {found['speedup']:.2f}x as fast as dense" in log.read_text()
    page = (tmp_path / "runs" / "fast" / "report" / "index.html").read_text()
    assert re.search("<th[^>]*>measured</th>", page)
    assert "No latency was measured" not in page


@pytest.mark.timeout(600)
def test_a_fit_on_a_ray_cluster(sweep_file, lightning, tmp_path):
    """A real one, on this machine, which the sweep's process ends; the test of docs/sweeps.md goes on with its run."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    words = [sys.executable, "-m", "lte_lightning", "sweep", sweep_file(epochs=(0, 1, 1)), "--ray-address", "local"]
    words += ["--trainer.logger", "false"]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    (found,) = results_of(tmp_path / "runs" / "sweep-trial").values()
    assert found["versions"]["threads"] == 1
    assert f"hard {found['hard']:.4f}" in process.stdout
    (results,) = tmp_path.glob("runs/sweep-trial/*/results.json")
    run = results.parent
    test = lightning(tmp_path, None, "test", "--config", run / "config.yaml", "--model.init_from", run / "model")
    assert (test.code, test.written) == (0, run / "test.json"), test.err
    assert json.loads((run / "test.json").read_text())["accuracy"] == pytest.approx(found["hard"])

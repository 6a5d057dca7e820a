"""`lte sweep` with real fits: what it checks before it runs, and that a killed one goes on as if nothing had been."""

import itertools
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from mlflow.tracking import MlflowClient

from lte_lightning.cli import main
from lte_lightning.cli.check import check_commands
from lte_lightning.errors import UserError
from lte_lightning.report.collect import collect
from lte_lightning.report.tables import everything
from lte_lightning.report.tracked import collect_tracked
from lte_lightning.results import Place
from lte_lightning.store import read_run_file
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import OBJECTIVES, read_sweep
from lte_lightning.sweep.tracking import Tracker

SWEEPS = Path(__file__).parents[2] / "sweeps"
ETA = "model.efficiency_weight"
VIEWS = ("dense", "soft", "hard_before", "hard", "sparsity", "sparsity_per_layer")


def test_there_are_sweeps():
    assert {"smoke.yaml", "minilm-sst2.yaml"} <= {path.name for path in SWEEPS.glob("*.yaml")}


@pytest.mark.timeout(600)  # some have hundreds of points
@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_s_points_are_instantiated(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lte"])
    sweep = read_sweep(path, {"trainer.accelerator": "cpu", "trainer.devices": 1}, seeds=[0])
    points = sweep.points()
    if sweep.search:
        points += [point for one in sweep.search.examples() for point in sweep.trial(one)]
    assert sweep.about
    assert {point.role for point in points} == {"start", "floor", "point"}
    kept = representatives(points)
    found = check_commands([point.arguments() for point in kept])
    assert [one["error"] for one in found] == [None] * len(kept)


def representatives(points):
    """Points that show each role of each variant, and each option with each of its words, of numbers the two ends."""
    words = {}
    for option, word in itertools.chain(*map(pairs, points)):
        words.setdefault(option, {})[word] = point_number(word)
    middle = {
        (option, word)
        for option, numbers in words.items()
        for word, number in numbers.items()
        if None not in numbers.values() and min(numbers.values()) < number < max(numbers.values())
    }
    seen, kept = set(), []
    for point in points:
        facts = {(point.role, point.variant), *pairs(point)} - middle
        if not facts <= seen:
            kept.append(point)
        seen |= facts
    return kept


def pairs(point):
    return [(option, word) for option, word in itertools.pairwise(point.arguments()) if option.startswith("--")]


def point_number(word):
    try:
        return float(word)
    except ValueError:
        return None


def test_a_sweep_s_representatives():
    points = read_sweep(SWEEPS / "minilm-stsb.yaml", {}, seeds=[0]).points()
    kept = representatives(points)
    assert 0 < len(kept) < len(points)
    assert {point.role for point in kept} == {"start", "floor", "point"}
    etas = [point.overrides[ETA] for point in points if point.role == "point"]
    assert {point.overrides[ETA] for point in kept if point.role == "point"} == {min(etas), max(etas)}
    points = read_sweep(SWEEPS / "roberta-base-glue.yaml", {}, seeds=[0]).points()
    kept = representatives(points)
    for of in (lambda point: (point.role, point.variant), lambda point: point.arguments()[2]):
        assert {*map(of, kept)} == {*map(of, points)}  # each method and each configuration, not each pair of them
    assert len(kept) < len(points) / 4


@pytest.fixture
def sweep_file(tiny, tmp_path):
    """`sweep_file(**content)` writes a sweep over a tiny fit."""

    def write(epochs=(2, 1, 1), **content):
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny.config(epochs=epochs)))
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump({"configs": ["tiny.yaml"]} | content))
        return tmp_path / "trial.yaml"

    return write


@pytest.fixture
def sweep(lightning, tmp_path):
    """`sweep(*words)` runs `lte sweep` in the test's folder."""
    return lambda *words: lightning(tmp_path, None, "sweep", *words)


@pytest.fixture
def checked_here(monkeypatch):
    """Command lines are read in this process, which has imported Lightning: another one takes eight seconds for that.

    Tests without this fixture show that the other process answers the same way.
    """

    def check(words, input, **_):
        assert words == [sys.executable, "-m", "lte_lightning.cli.check"]
        with mock.patch.object(sys, "argv", ["lte"]):
            answers = check_commands(json.loads(input))
        return subprocess.CompletedProcess(words, 0, json.dumps(answers), "")

    monkeypatch.setattr("lte_lightning.cli.sweep.subprocess", SimpleNamespace(run=check))


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
            folder.remember(point, status="done", command=shlex.join(["lightning", *point.arguments()]))
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


def results_of(folder):
    found = {}
    for file in folder.glob("*/results.json"):
        name = json.loads((file.parent / "run.json").read_text())["name"]
        assert name not in found
        found[name] = json.loads(file.read_text())
    return found


@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_as_if_nothing_had_been(sweep_file, sweep, lightning, tmp_path):
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server over HTTP; its address."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                assert urllib.request.urlopen(f"{address}/health").read() == b"OK"
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.timeout(600)
def test_the_smoke_sweep_on_a_real_mlflow_server(server, tiny, sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", "//me:SECRET@"))
    small = ["--model.pretrained", tiny.model, "--model.lte.expert_size", 8, "--trainer.accelerator", "cpu"]
    small += ["--data.class_path", "lte_lightning.data.GlueData", "--data.task", "sst2", "--data.source"]
    outcome = sweep(SWEEPS / "smoke.yaml", *small, tiny.task("sst2"), "--data.train_rows", 32)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "sweep-smoke"
    assert not (tmp_path / "mlflow.db").exists()
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("sweep-smoke")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("sweep sweep-smoke")
    assert parent.info.status == "FINISHED"
    assert "--data.train_rows 32" in parent.data.tags["lte.command"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {
        "differences.md",
        "plan.json",
        "sweep.yaml",
        "table.csv",
        "table.md",
        *(file.name for file in (folder / "report").iterdir()),
    }
    assert {"index.html", "quality-sst2.png"} <= files
    results = results_of(folder)
    assert runs.keys() == results.keys()
    assert [name.split("-")[0] for name in sorted(runs)] == ["LTE", "constant_lambda", "floor", "start"]
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["lte.point"] == name
        assert run.data.tags["lte.code"] == results[name]["versions"]["code"] == parent.data.tags["lte.code"]
        assert run.data.params["point/seed"] == "0"
        assert run.data.params["point/data.train_rows"] == "32"
        assert run.data.metrics["results/dense"] == pytest.approx(results[name]["dense"])
        assert "results.json" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert (
        next(run for name, run in runs.items() if name.startswith("const")).data.tags["lte.variant"]
        == "constant lambda"
    )
    assert runs[min(runs)].data.params["point/model.efficiency_weight"] == "0.3"
    # a part of the same again: nothing is run, the parent goes on, and its table holds all
    words = ("--data.train_rows", 32, "--trainer.enable_progress_bar", "false", "--only", "LTE")
    again = sweep(SWEEPS / "smoke.yaml", *small, f"{tiny.task('sst2')}/", *words)
    assert "3 of 3 points are done already." in again.out
    assert "| constant lambda | 0.5 | 0.05 |" in again.out
    assert len(client.search_runs([experiment.experiment_id])) == 5
    # the password is in nothing that was kept, or shown
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]
    assert "SECRET" not in outcome.out + outcome.err + str([run.to_dictionary() for run in (parent, *runs.values())])
    address = server.replace("//", "//***@")
    assert {read_run_file(run)["tracking_uri"] for run in (path.parent for path in folder.glob("*/run.json"))} == {
        address
    }
    # what the server knows makes the same report as the folder, but for a weight that all have
    tracked, local = collect_tracked(server, "sweep-smoke"), collect([folder])
    rows = [[row[:1] + row[2:] for row in everything(one, "sst2").rows] for one in (tracked, local)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert tracked.dense("sst2") == local.dense("sst2")
    for run in tracked.runs:
        (same,) = (other for other in local.runs if other.name == run.name)
        assert (run.method, run.role, run.lte, run.family) == (same.method, same.role, same.lte, "bert")
        assert run.parameters == same.parameters
        assert (run.results, run.histogram) == (same.results, same.histogram)
    main(["report", "--tracking-uri", server, "--experiment", "sweep-smoke", "--out", str(tmp_path / "page")])
    assert "constant lambda" in (tmp_path / "page" / "index.html").read_text()


def test_an_mlflow_server_that_is_not_there(checked_here, sweep_file, sweep, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    outcome = sweep(sweep_file(), "--trainer.logger", "true")
    assert outcome.code == 1
    assert f"cannot reach the MLflow server at http://127.0.0.1:{port}" in outcome.err
    assert not list(tmp_path.glob("runs/*/*/run.json"))


@pytest.mark.parametrize("says", ["nothing", "nonsense"])
def test_who_listens_but_is_no_mlflow_server(says, checked_here, sweep_file, sweep, tmp_path, monkeypatch):
    """MLflow itself would try for many minutes."""
    monkeypatch.setattr("lte_lightning.network.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        if says == "nonsense":

            def answer() -> None:
                for _ in range(2):  # once to be reached, once to be asked
                    connection, _ = other.accept()
                    connection.sendall(b"220 mail.example.org ESMTP\r\n")
                    connection.close()

            threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"http://127.0.0.1:{other.getsockname()[1]}")
        outcome = sweep(sweep_file(), "--trainer.logger", "true")
    assert outcome.code == 1
    assert f"the MLflow server at {uri} does not answer: " in outcome.err
    assert "start it, or name another by MLFLOW_TRACKING_URI" in outcome.err
    assert not list(tmp_path.glob("runs/*/*/run.json"))


def test_a_locked_mlflow_database(tmp_path, monkeypatch):
    """The store's own patience is not waited for: the sweep says what is wrong once it has given up."""
    database = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    (tmp_path / "base.yaml").touch()
    (tmp_path / "trial.yaml").write_text("configs: [base.yaml]")
    folder = SweepFolder(tmp_path / "runs" / "trial")
    with (
        folder.hold(read_sweep(tmp_path / "trial.yaml")),
        pytest.raises(UserError, match=r"locked.*MLFLOW_TRACKING_URI"),
    ):
        Tracker(folder, f"sqlite:///{tmp_path / 'locked.db'}?timeout=0")
    database.close()

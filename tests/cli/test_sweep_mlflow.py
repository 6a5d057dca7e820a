"""`lte sweep` and MLflow: a real server, and what is said of one that is away, something else or locked."""

import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lte_lightning.cli import main
from lte_lightning.errors import UserError
from lte_lightning.report.collect import collect
from lte_lightning.report.tables import everything
from lte_lightning.report.tracked import collect_tracked
from lte_lightning.store import read_run_file
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.tracking import Tracker

from .conftest import results_of

SWEEPS = Path(__file__).parents[2] / "sweeps"


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
def test_the_smoke_sweep_on_a_real_mlflow_server(fits_here, server, tiny, sweep, tmp_path, monkeypatch):
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
    assert "name another by MLFLOW_TRACKING_URI, or record nothing" in outcome.err
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

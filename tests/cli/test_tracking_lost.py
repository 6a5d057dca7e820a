"""A fit does not depend on MLflow: what its store does not take waits in the run's folder, and is sent later."""

import json
import shutil
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sqlalchemy
from mlflow.tracking import MlflowClient

from lte_lightning.callbacks import StageSchedule
from lte_lightning.errors import UserError
from lte_lightning.network import try_store
from lte_lightning.recording.unsent import UNSENT

LOST = r"MLflow's store .* cannot be used: .* that is sent when the store is back, or by lte sync RUN"


@pytest.fixture
def migrated(fitted, tmp_path):
    """A folder with a database: to migrate a new one takes seconds."""
    shutil.copy(fitted.cwd / "mlflow.db", tmp_path)
    return tmp_path


@pytest.fixture
def config(tiny):
    return tiny.config(epochs=(1, 1, 1), **{"trainer.logger": True, "run.experiment": "lost", "run.name": "mine"})


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(step, do)` does something in the middle of the fits of this test."""
    whole = StageSchedule.on_train_batch_start

    def arrange(step, do):
        def hook(self, trainer, *args):
            if trainer.global_step == step:
                do()
            whole(self, trainer, *args)

        monkeypatch.setattr(StageSchedule, "on_train_batch_start", hook)

    return arrange


def assert_complete(folder, run, began_without):
    about = json.loads((run / "run.json").read_text())
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.get_run(about["run_id"])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "mine")
    assert found.data.params["efficiency_weight"] == "1.0"
    history = client.get_metric_history(about["run_id"], "train/loss")
    assert sorted(metric.step for metric in history) == list(range(24))
    results = json.loads((run / "results.json").read_text())
    assert found.data.metrics["results/hard"] == pytest.approx(results["hard"])
    artifacts = {file.path for file in client.list_artifacts(about["run_id"])}
    assert artifacts >= {"config.yaml", "results.json", "sparsity_per_layer.png", "scores.png", "model"}
    assert not (run / UNSENT).exists()
    runs = client.search_runs([client.get_experiment_by_name("lost").experiment_id])
    assert [run.info.run_id for run in runs] == [about["run_id"]]
    assert (run.name == about["run_id"]) is not began_without


def lock(file):
    connection = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@pytest.fixture
def impatient():
    """SQLite gives up a locked database at once. MLflow tells it to wait for 20 seconds, and has no option for that."""

    def shorten(connection, cursor, statement, parameters, context, many):
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", shorten, retval=True)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", shorten)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("step", [None, 0, 12])
def test_a_locked_database(step, migrated, config, lightning, at_step):
    """From before the fit, from its first step, from within its second stage."""
    held = []
    if step is None:
        held.append(lock(migrated / "mlflow.db"))
    else:
        at_step(step, lambda: held.append(lock(migrated / "mlflow.db")))
    with pytest.warns(UserWarning, match=LOST) as warned:
        fit = lightning(migrated, config, "fit")
    assert fit.code == 0, fit.err
    assert len([one for one in warned if "cannot be used" in str(one.message)]) == 1
    waiting = [json.loads(line) for line in (fit.run / UNSENT).read_text().splitlines()]
    assert sum("train/loss" in entry.get("metrics", {}) for entry in waiting) == 24 - (step or 0)

    refused = lightning(migrated, None, "sync", fit.run)
    assert refused.code == 1
    assert "locked" in refused.err
    assert refused.err.count("\n") == 1
    held.pop().close()
    sent = lightning(migrated, None, "sync", fit.run)
    assert sent.code == 0, sent.err
    assert sent.out == f"{fit.run}: {len(waiting)} entries sent\n"
    assert_complete(migrated, fit.run, began_without=step is None)
    assert lightning(migrated, None, "sync", fit.run).out == f"{fit.run}: nothing waits\n"


def test_what_waits_is_sent_when_the_fit_is_resumed(migrated, config, lightning, at_step, break_at):
    shutil.move(migrated / "mlflow.db", migrated / "kept.db")
    (migrated / "mlflow.db").write_bytes(b"this is no database" * 100)
    config["trainer"]["max_epochs"] = 2
    with pytest.warns(UserWarning, match=LOST):
        stopped = lightning(migrated, config, "fit")
    assert stopped.code == 0, stopped.err
    shutil.move(migrated / "kept.db", migrated / "mlflow.db")
    config["trainer"]["max_epochs"] = -1
    resumed = lightning(migrated, config, "fit", "--ckpt_path", stopped.run / "checkpoints" / "last.ckpt")
    assert resumed.code == 0, resumed.err
    assert_complete(migrated, resumed.run, began_without=True)


class Dying(BaseHTTPRequestHandler):
    """A server that answers its health check, and nothing else: it hangs, or refuses."""

    status: int | None = None

    def do_GET(self):
        if self.path.endswith("/health"):
            self.send_response(200)
        elif self.status is None:
            time.sleep(30)
            return
        else:
            self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """`server(status)`: the address of a server that answers so."""
    servers = []

    def start(status):
        handler = type("Answers", (Dying,), {"status": status})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        servers[-1].daemon_threads = True
        servers[-1].block_on_close = False
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://me:SECRET@127.0.0.1:{servers[-1].server_port}"

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_password_or_server_is_one_line(status, config, server, lightning, tmp_path, monkeypatch):
    address = server(status)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    began = time.monotonic()
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 1
    assert time.monotonic() - began < 60  # ten seconds on a machine of its own
    (line,) = [line for line in fit.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: MLflow's store {address.replace('me:SECRET', '***')} refuses: ")
    assert "SECRET" not in fit.err + fit.out
    assert "Traceback" not in fit.err
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize("address", ["http://me:SECRET@nowhere.invalid:5000", "http://me:SECRET@127.0.0.1:99999"])
def test_a_wrong_address_is_one_line(address, config, lightning, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 1
    assert fit.err.splitlines()[-1].startswith("error: ")
    assert "***@" in fit.err
    assert "SECRET" not in fit.err + fit.out
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_server_that_is_away(config, lightning, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:SECRET@127.0.0.1:9")
    with pytest.warns(UserWarning, match=LOST) as warned:
        fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    said = [str(one.message) for one in warned if "cannot be used" in str(one.message)]
    assert len(said) == 1
    everything = "".join(file.read_text(errors="replace") for file in fit.run.rglob("*") if file.is_file())
    assert "SECRET" not in fit.err + fit.out + said[0] + everything
    assert (fit.run / UNSENT).exists()


def test_a_server_that_hangs(config, server, lightning, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server(None))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match=LOST):
        fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert (fit.run / UNSENT).exists()


def test_a_store_that_mlflow_alone_knows_is_left_to_it():
    try_store("databricks://profile")  # no address to connect to
    with pytest.raises(UserError, match="is no address of the MLflow database"):
        try_store("mysql+pymysql://:3306/db")

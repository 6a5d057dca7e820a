"""A store that keeps its reader waiting, and one that refuses, are told within seconds by each of its readers."""

import contextlib
import os
import socket
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lte_lightning import network
from lte_lightning.bench.keeping import begin_mlflow
from lte_lightning.errors import UserError
from lte_lightning.network import AwayError, try_store
from lte_lightning.recording.unsent import open_run
from lte_lightning.report.tracked import collect_tracked
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.tracking import Tracker


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What a test sets in the environment, `try_store` among it, ends with the test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def dripping():
    """The port of a server that sends a byte from time to time, and never ends what it says."""
    ended = threading.Event()

    def drip(connection):
        with connection:
            while not ended.wait(0.2):
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):  # who only looks whether somebody listens
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        ended.set()
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def silent():
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


class Answers(BaseHTTPRequestHandler):
    status = 500

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The port of a web server that answers everything by a status (`Answers.status`) and nothing else."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as started:
        started.daemon_threads = True
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started.server_port
        started.shutdown()


def test_slow_bytes(dripping, monkeypatch):
    monkeypatch.setattr(network, "ALTOGETHER", 1)
    with pytest.raises(AwayError, match=rf"^MLflow's store http://127.0.0.1:{dripping} does not answer within 1 s"):
        try_store(f"http://127.0.0.1:{dripping}")


def test_a_database_that_says_nothing(silent, monkeypatch):
    monkeypatch.setattr(network, "ALTOGETHER", 1)
    message = rf"^MLflow's store mysql\+pymysql://\*\*\*@127.0.0.1:{silent}/runs does not answer within 1 s"
    with pytest.raises(AwayError, match=message):
        try_store(f"mysql+pymysql://me:SECRET@127.0.0.1:{silent}/runs")


def of_a_report(uri, _):
    collect_tracked(uri, "any")


def of_a_sweep(uri, folder):
    (folder / "base.yaml").touch()
    (folder / "trial.yaml").write_text("configs: [base.yaml]")
    trial = SweepFolder(folder / "runs" / "trial")
    with trial.hold(read_sweep(folder / "trial.yaml")):
        Tracker(trial, uri)


def of_timings(uri, _):
    os.environ["MLFLOW_TRACKING_URI"] = uri
    begin_mlflow("any")


@pytest.mark.parametrize("reader", [of_a_report, of_a_sweep, of_timings])
def test_a_database_that_is_away(reader, free, tmp_path):
    """MLflow tries to connect for an hour."""
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot reach the MLflow database at .*Connection refused; ") as raised:
        reader(f"mysql+pymysql://me:SECRET@127.0.0.1:{free}/runs", tmp_path)
    assert time.monotonic() - began < 60  # seconds on a machine of its own
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize("reader", [of_a_report, of_a_sweep, of_timings])
def test_a_server_that_fails(reader, server, tmp_path):
    """MLflow tries each request for minutes."""
    began = time.monotonic()
    with pytest.raises(UserError, match=r"500 error responses|error code 500"):
        reader(f"http://me:SECRET@127.0.0.1:{server}", tmp_path)
    assert time.monotonic() - began < 60


def of_a_fit(uri, _):
    return open_run(uri, None, {"experiment": "any"})


@pytest.mark.parametrize("reader", [of_a_fit, of_a_sweep])
def test_a_server_that_says_yes_to_everything(reader, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "status", 200)
    with pytest.raises(AwayError, match="its answer names no run"):
        reader(f"http://me:SECRET@127.0.0.1:{server}", tmp_path)


def test_a_folder_is_no_database(tmp_path):
    """MLflow tries to open it for an hour."""
    with pytest.raises(AwayError, match="unable to open database file; name another with --tracking-uri"):
        of_a_report(f"sqlite:///{tmp_path}", None)


def test_a_report_reads_a_database_that_nobody_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write whatever the file says
    with sqlite3.connect(tmp_path / "kept.db") as database:
        database.execute("CREATE TABLE any (x)")
        database.commit()
        other = sqlite3.connect(tmp_path / "kept.db")
        other.execute("BEGIN IMMEDIATE")  # no lock that writers need is asked for
        try_store(f"sqlite:///{tmp_path / 'kept.db'}")
        other.close()
    database.close()

"""Runs that begin at the same moment in a folder without a database."""

import json
import multiprocessing

import pytest
from mlflow.tracking import MlflowClient

from lte_lightning.errors import UserError
from lte_lightning.recording.recorder import Recorder

FITS = 3


def begin(name, ready, folder):
    recorder = Recorder(root=f"{folder}/runs", name=name, tracking_uri=f"sqlite:///{folder}/mlflow.db")
    ready.wait()
    recorder.make_logger()


# a child only talks to the database; Python 3.12 cannot know
@pytest.mark.timeout(400)  # MLflow makes its tables in dozens of steps
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_fits_that_begin_together_share_a_new_database(tmp_path):
    (tmp_path / "mlflow.db.new").write_text("a fit was killed while it made the tables")
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(FITS)
    processes = [context.Process(target=begin, args=(f"fit {i}", ready, tmp_path)) for i in range(FITS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * FITS
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("lte")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"fit {i}" for i in range(FITS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "runs"]


def test_latency_on_no_rows():
    with pytest.raises(UserError, match="latency_rows is 0; it is a number of rows, at least 1"):
        Recorder(latency_rows=0)


def test_a_password_is_taken_from_the_environment_alone(tmp_path, monkeypatch):
    """What a run keeps of an address has none, and is completed by the variable when the run goes on."""
    address = "postgresql://me:SECRET@host/runs"
    with pytest.raises(UserError, match=r"run\.tracking_uri is postgresql://\*\*\*@host/runs, and what .* by MLFLOW_"):
        Recorder(tracking_uri=address)
    (tmp_path / "run.json").write_text(
        json.dumps({"experiment": "x", "run_id": "ab", "tracking_uri": "postgresql://***@host/runs"})
    )
    forgetful = Recorder(root=str(tmp_path))
    forgetful.resume(str(tmp_path / "checkpoints" / "last.ckpt"))
    with pytest.raises(UserError, match=r"postgresql://\*\*\*@host/runs was kept without its password: give its whole"):
        forgetful.make_logger()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    recorder = Recorder()
    recorder.resume(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert (recorder.tracking_uri, recorder.run_id) == (address, "ab")

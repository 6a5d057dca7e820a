"""What MLflow is told of a sweep, by a real store, and when another takes its place."""

import json
from importlib.util import find_spec

import pytest
from mlflow.tracking import MlflowClient

from lte_lightning.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.recall import recognise
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.tracking import Tracker

ETA = "model.efficiency_weight"


@pytest.fixture
def store(tmp_path):
    """The address of a store of the test's own."""
    return f"sqlite:///{tmp_path / 'own.db'}"


def test_what_a_killed_sweep_did_not_tell_is_told(bench, store, tmp_path):
    """A fit that was killed after its results were written is ended, and a point without its tags gets them."""
    trial = bench(grid={ETA: [0.5, 0.7]})
    swept = trial.run()
    made = []

    def tracker(folder):
        made.append(Tracker(folder, store))
        return made[-1]

    # as if the fits had recorded in the store, and the first had been killed before it ended its run
    folder = SweepFolder(swept.folder.path)
    with folder.hold(read_sweep(trial.file), words=["lte", "sweep", "trial.yaml"]):
        first = Tracker(folder, store)
        first.begin()
    client, ids = first.client, {}
    experiment = client.get_run(first.parent).info.experiment_id
    (killed, _), (ended, _) = runs = [(name, found[0]) for name, found in swept.folder.attempts().items()]
    for name, run in runs:
        about = json.loads((run / "run.json").read_text())
        ids[name] = client.create_run(experiment, run_name=name).info.run_id
        (run / "run.json").write_text(json.dumps(about | {"run_id": ids[name], "tracking_uri": store}))
        results = json.loads((run / "results.json").read_text())
        results["versions"] |= {"commit": "0123abcd", "code": name[:3]}
        (run / "results.json").write_text(json.dumps(results))
        (run / "scores.png").write_bytes(b"picture")
    client.set_terminated(ids[ended], "FINISHED")
    assert trial.run(tracker=tracker).said == ["2 of 2 points are done already."]
    assert made[0].parent == first.parent
    for name, run_id in ids.items():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert (run.data.tags["lte.point"], run.data.tags["lte.role"]) == (name, "point")
        assert (run.data.tags["lte.git"], run.data.tags["lte.code"]) == ("0123abcd", name[:3])
        assert run.data.params["point/seed"] == "0"
    files = {file.path for file in client.list_artifacts(ids[killed])}
    assert files == {"results.json", "scores.png"}
    assert client.list_artifacts(ids[ended]) == []
    eta = float(client.get_run(ids[killed]).data.params[f"point/{ETA}"])
    assert client.get_run(ids[killed]).data.metrics["results/bound"] == 1 + eta
    # told once: what somebody does to the run then is kept
    client.delete_tag(ids[killed], "lte.role")
    trial.run(tracker=tracker)
    assert "lte.role" not in client.get_run(ids[killed]).data.tags
    made[-1].end([swept.folder.path / "sweep.yaml"], failed=False)
    parent = client.get_run(first.parent)
    assert parent.data.tags["lte.command"] == "lte sweep trial.yaml"
    assert (parent.data.tags["lte.sweep"], parent.data.tags["lte.folder"]) == ("trial", str(tmp_path))
    assert (parent.data.tags["lte.git"], parent.data.tags["lte.code"]) == ("0123abcd", "fit")
    assert [file.path for file in client.list_artifacts(first.parent)] == ["sweep.yaml"]


def test_a_store_named_now_takes_the_place_of_the_one_before(bench, store, tmp_path, monkeypatch):
    trial = bench(overrides={"data.stop": "true"})
    folder = SweepFolder(tmp_path / "runs" / "trial")
    ((name, _),) = trial.run().summary.failed.items()
    (run,) = folder.attempts()[name]
    gone = "http://127.0.0.1:9"
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"run_id": "ab", "tracking_uri": gone}))
    with folder.hold(read_sweep(trial.file)):
        folder.about["mlflow"] = {"uri": gone, "parent": "cd"}
        folder.save()
        with pytest.raises(UserError, match=r"cannot reach the MLflow server .*name another by MLFLOW_TRACKING_URI"):
            Tracker(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "mended").touch()
    swept = trial.run(tracker=Tracker)
    assert swept.summary.done == [name]
    assert "resumed" in swept.folder.log(name).read_text()  # it goes on, as a child in the new store
    about, kept = json.loads((run / "run.json").read_text()), swept.folder.about["mlflow"]
    assert (about["tracking_uri"], kept["uri"]) == (store, store)
    child = MlflowClient(store).get_run(about["run_id"])
    assert child.data.tags["mlflow.parentRunId"] == kept["parent"]
    assert (child.info.run_name, child.data.tags["lte.point"]) == (name, name)
    # the store of before is the default, wherever the sweep is started
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with folder.hold(recognise(read_sweep(trial.file), folder)):
        assert Tracker(folder).parent == kept["parent"]
        assert folder.about["mlflow"]["parents"][gone] == "cd"


def test_a_store_whose_database_was_replaced(bench, store, tmp_path):
    """A fit that goes on is a child of the new parent, as is the parent itself."""
    trial = bench(overrides={"data.stop": "true"})
    folder = SweepFolder(tmp_path / "runs" / "trial")
    ((name, _),) = trial.run().summary.failed.items()
    (run,) = folder.attempts()[name]
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"run_id": "ab" * 16, "tracking_uri": store}))
    (tmp_path / "mended").touch()
    swept = trial.run(tracker=lambda folder: Tracker(folder, store))
    assert swept.summary.done == [name]
    (child,) = MlflowClient(store).search_runs(["1"], "tags.`lte.role` = 'point'")
    assert child.info.run_id == json.loads((run / "run.json").read_text())["run_id"]
    assert child.data.tags["mlflow.parentRunId"] == swept.folder.about["mlflow"]["parent"]


def test_an_address_that_was_kept_without_its_password(bench, tmp_path):
    trial = bench()
    folder = trial.run().folder
    with folder.hold(recognise(read_sweep(trial.file), folder)):
        folder.about["mlflow"] = {"uri": "postgresql://***@host/runs", "parent": "ab"}
        with pytest.raises(UserError, match=r"store postgresql://\*\*\*@host/runs was kept without its password: give"):
            Tracker(folder)


@pytest.mark.skipif(find_spec("psycopg2") is not None, reason="the driver that shall be missing is here")
def test_a_database_without_its_driver(bench):
    folder = bench().run().folder
    message = r"cannot be used: No module named 'psycopg2'; install the database's driver, or"
    with folder.hold(read_sweep(bench().file)), pytest.raises(UserError, match=message):
        Tracker(folder, "postgresql+psycopg2://nobody@127.0.0.1/runs")

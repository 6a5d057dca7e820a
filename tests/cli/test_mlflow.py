"""One fit is one MLflow run, in an embedded database by default."""

import json
import shutil
import warnings

import pytest
from mlflow.tracking import MlflowClient


def client_of(run):
    about = json.loads((run / "run.json").read_text())
    return MlflowClient(about["tracking_uri"]), about


def test_a_fit_is_a_run_with_parameters_metrics_and_artifacts(fitted):
    assert (fitted.cwd / "mlflow.db").exists()
    client, about = client_of(fitted.run)
    assert (about["experiment"], about["run_id"]) == ("lte", fitted.run.name)
    run = client.get_run(about["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["efficiency_weight"] == "1.0"
    assert run.data.params["lte/expert_size"] == "8"
    results = fitted.results
    for view in ("dense", "soft", "hard_before", "hard"):
        assert f"val/{view}/accuracy" in run.data.metrics
    assert run.data.metrics["results/hard"] == pytest.approx(results["hard"])
    assert run.data.metrics["results/sparsity"] == pytest.approx(results["sparsity"])
    assert run.data.metrics["results/union_sparsity_8"] == pytest.approx(results["union_sparsity"]["8"])
    assert len(client.get_metric_history(about["run_id"], "train/loss")) == 7 * 8
    assert len(client.get_metric_history(about["run_id"], "val/hard/sparsity")) == 2
    artifacts = {file.path for file in client.list_artifacts(about["run_id"])}
    assert artifacts >= {"config.yaml", "results.json", "sparsity_per_layer.png", "scores.png"}
    assert [file.path for file in client.list_artifacts(about["run_id"], "model")] == ["model/lte_config.json"]
    assert run.info.artifact_uri == (fitted.run / "artifacts").as_uri()


@pytest.fixture
def migrated(fitted, tmp_path):
    """A folder with a database: to migrate a new one takes seconds."""
    shutil.copy(fitted.cwd / "mlflow.db", tmp_path)
    return tmp_path


def test_a_resumed_fit_continues_its_run(migrated, tiny, lightning, break_at):
    config = tiny.config(**{"trainer.logger": True, "run.experiment": "resumed"})
    break_at(12, RuntimeError("power cut"))  # in the middle of the second epoch
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(migrated, config, "fit")
    (run,) = migrated.glob("runs/resumed/*")
    assert not (run / "results.json").exists()
    break_at(-1, RuntimeError())
    (migrated / "elsewhere").mkdir()
    words = ("--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    resumed = lightning(migrated / "elsewhere", None, "fit", *words)
    assert resumed.code == 0, resumed.err
    assert resumed.written == run / "results.json"
    assert list((migrated / "elsewhere").iterdir()) == []
    client, about = client_of(run)
    experiment = client.get_experiment_by_name("resumed")
    assert [found.info.run_id for found in client.search_runs([experiment.experiment_id])] == [about["run_id"]]
    assert client.get_run(about["run_id"]).info.status == "FINISHED"
    steps = {metric.step for metric in client.get_metric_history(about["run_id"], "train/loss")}
    assert steps == set(range(24))


def test_a_test_with_other_options_continues_the_run_of_the_fit(migrated, tiny, lightning):
    config = tiny.config(epochs=(0, 1, 1), **{"trainer.logger": True, "run.experiment": "tested"})
    fit = lightning(migrated, config, "fit")
    client, about = client_of(fit.run)
    before = client.get_run(about["run_id"]).data.params
    other = ("--model.init_from", fit.run / "model", "--data.batch_size", "4", "--data.max_length", "16")
    outcome = lightning(migrated, config, "test", *other)
    assert outcome.code == 0, outcome.err
    run = client.get_run(about["run_id"])
    assert run.data.params == before
    assert run.data.metrics["test/sparsity"] == pytest.approx(json.loads(outcome.written.read_text())["sparsity"])
    logged = ("accuracy", "sparsity_layer_01", "union_sparsity_8", "gflops_per_token", "bound")
    assert {f"test/{name}" for name in logged} <= set(run.data.metrics)


def test_the_environment_names_the_store(migrated, tiny, lightning, monkeypatch):
    (migrated / "mlflow.db").rename(migrated / "mine.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{migrated / 'mine.db'}")
    config = tiny.config(epochs=(1, 0, 0), **{"trainer.logger": True, "run.experiment": "mine"})
    fit = lightning(migrated, config, "fit")
    assert fit.code == 0, fit.err
    assert not (migrated / "mlflow.db").exists()
    client, about = client_of(fit.run)
    assert about["tracking_uri"] == f"sqlite:///{migrated / 'mine.db'}"
    assert client.get_run(about["run_id"]).info.status == "FINISHED"
    assert fit.results["hard"] is None
    assert fit.results["sparsity"] is None


def test_a_refused_run_shows_its_reason_alone(tiny, lightning, tmp_path):
    (tmp_path / "empty").mkdir()
    options = {"trainer.logger": True, "model.init_args.init_from": str(tmp_path / "empty")}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit = lightning(tmp_path, tiny.config(**options), "fit")
    assert fit.code == 1
    assert "cannot load the model" in fit.err
    assert "unsent" not in fit.err
    assert not [warning for warning in seen if "MLflow's store" in str(warning.message)]
    assert not list(tmp_path.glob("runs/*/*/*"))

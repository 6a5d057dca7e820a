"""One fit is one MLflow run, in an embedded database by default."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
import warnings

import mlflow
import pandas
import pytest
import uvicorn
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.pyfunc.scoring_server import init as serve
from mlflow.tracking import MlflowClient
from transformers import AutoTokenizer

import lte_lightning


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


def test_mlflow_knows_every_option_the_rates_the_data_and_what_the_run_is(fitted, tiny):
    client, about = client_of(fitted.run)
    run = client.get_run(about["run_id"])
    expected = {
        "data.class": "GlueData",
        "data.batch_size": "8",
        "model.lte.expert_size": "8",
        "stages.router.epochs": "3",
        "stages.router.router_learning_rate": "0.03",
        "trainer.accelerator": "cpu",
        "seed_everything": "1",
    }
    assert expected.items() <= run.data.params.items()
    rates = {metric.step: metric.value for metric in client.get_metric_history(about["run_id"], "lr/model")}
    assert sorted(rates) == list(range(7 * 8))
    assert max(rates.values()) == pytest.approx(5e-3)
    assert max(rates[step] for step in range(5 * 8, 7 * 8)) == pytest.approx(5e-3)  # each stage has its own
    routers = {metric.step for metric in client.get_metric_history(about["run_id"], "lr/routers")}
    assert routers == set(range(2 * 8, 5 * 8))
    tags = run.data.tags
    assert (tags["lte.task"], tags["lte.method"], tags["lte.stage"]) == ("sst2", "lte", "expert")
    assert tags["lte.model"] == tiny.model.parent.name
    assert tags["lte.commit"]
    assert f"accuracy {fitted.results['hard']:.4f} (hard)" in tags["mlflow.note.content"]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.source_type) == ("sst2", "local")
    assert json.loads(data.dataset.source)["uri"] == str(tiny.task("sst2"))
    assert json.loads(data.dataset.profile) == {"train_rows": 64, "validation_rows": 20}
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]


TEXTS = ["the film was good", "a dull plot", "very bright is the end", "it was poor"]


@pytest.fixture(scope="module")
def answers(fitted):
    """What the fit's own model answers."""
    model = lte_lightning.from_pretrained(fitted.run / "model").eval()
    assert model.lte_config.expert_size == 8
    tokenizer = AutoTokenizer.from_pretrained(fitted.run / "model")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return model(**batch).logits.softmax(dim=1).max(dim=1), model.config.id2label


@contextlib.contextmanager
def serving(model):
    """The server of `mlflow models serve`, in a thread; the address where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(serve(model), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/invocations"
    server.should_exit = True
    thread.join()


def test_the_model_is_loaded_and_served_by_mlflow(fitted, answers):
    client, about = client_of(fitted.run)
    run = client.get_run(about["run_id"])
    (logged,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{about['run_id']}'")
    assert logged.status == "READY"
    assert logged.tags["lte.task"] == "sst2"
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    mlflow.set_tracking_uri(about["tracking_uri"])
    loaded = mlflow.pyfunc.load_model(logged.model_uri)
    (shares, classes), names = answers
    assert [column.name for column in loaded.metadata.signature.inputs] == ["sentence"]
    found = loaded.predict(pandas.DataFrame({"sentence": TEXTS}))
    assert found["label"].tolist() == [names[number] for number in classes.tolist()]
    assert found["probability"].tolist() == pytest.approx(shares.tolist(), abs=1e-6)
    assert loaded.input_example is not None
    assert len(loaded.predict(loaded.input_example)) == 1

    request = {"dataframe_split": {"columns": ["sentence"], "data": [[text] for text in TEXTS]}}
    with serving(loaded) as address:
        post = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(post, timeout=60) as answer:
            rows = json.loads(answer.read())["predictions"]
    assert [row["label"] for row in rows] == found["label"].tolist()
    assert [row["probability"] for row in rows] == pytest.approx(found["probability"].tolist(), abs=1e-6)


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
    (run,) = (file.parent for file in migrated.glob("runs/resumed/*/run.json"))
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
    assert client.get_run(about["run_id"]).info.run_name == "sst2, lte, eta 1, seed 1"
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
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.search_runs([each.experiment_id for each in client.search_experiments()]) == []


@pytest.mark.parametrize(("end", "code"), [(SIGTERMException(), 143), (KeyboardInterrupt(), 1)])
def test_a_fit_that_somebody_ended_is_killed(end, code, migrated, tiny, lightning, break_at):
    config = tiny.config(epochs=(2, 0, 0), **{"trainer.logger": True, "run.experiment": "ended"})
    break_at(12, end)
    assert lightning(migrated, config, "fit").code == code
    (run,) = (file.parent for file in migrated.glob("runs/ended/*/run.json"))
    client, about = client_of(run)
    assert client.get_run(about["run_id"]).info.status == "KILLED"


class EndsInSetUp(Callback):
    """Sends SIGTERM before Lightning listens to it."""

    def on_fit_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_fit_that_somebody_ended_in_its_set_up_is_killed(migrated, tiny, lightning):
    callbacks = [{"class_path": f"{__name__}.EndsInSetUp"}]
    options = {"trainer.logger": True, "run.experiment": "set-up", "trainer.callbacks": callbacks}
    assert lightning(migrated, tiny.config(epochs=(2, 0, 0), **options), "fit").code == 143
    (run,) = (file.parent for file in migrated.glob("runs/set-up/*/run.json"))
    client, about = client_of(run)
    assert client.get_run(about["run_id"]).info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_registered_model_gets_a_version(migrated, tiny, lightning):
    options = {"trainer.logger": True, "run.experiment": "registered", "run.register_as": "reviews"}
    fit = lightning(migrated, tiny.config("stsb", (0, 1, 0), **options), "fit")
    assert fit.code == 0, fit.err
    client, about = client_of(fit.run)
    (version,) = client.search_model_versions("name = 'reviews'")
    assert version.run_id == about["run_id"]
    mlflow.set_tracking_uri(about["tracking_uri"])
    loaded = mlflow.pyfunc.load_model("models:/reviews/1")
    pairs = pandas.DataFrame({"sentence1": ["the cat sat"], "sentence2": ["a dog ran"]})
    assert isinstance(loaded.predict(pairs)["value"][0], float)


def test_a_run_may_leave_its_model_out(migrated, tiny, lightning):
    options = {"trainer.logger": True, "run.experiment": "lean", "run.log_model": False}
    fit = lightning(migrated, tiny.config(epochs=(1, 0, 0), **options), "fit")
    assert fit.code == 0, fit.err
    client, about = client_of(fit.run)
    assert client.search_logged_models([client.get_run(about["run_id"]).info.experiment_id]) == []
    refused = lightning(migrated, tiny.config(**options, **{"run.register_as": "x"}), "fit")
    assert refused.code != 0
    assert "run.register_as registers the model that run.log_model false leaves out" in refused.err

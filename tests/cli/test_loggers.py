"""Loggers beside MLflow, and instead of it."""

import csv
import json

import pytest
from lightning_utilities.core.imports import RequirementCache
from mlflow.tracking import MlflowClient

CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}}


def rows_of(folder):
    (file,) = folder.glob("csv/**/metrics.csv")
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("beside", [None, True])
def test_a_logger_takes_mlflows_place_or_stands_beside_it(beside, tiny, lightning, tmp_path):
    config = tiny.config(epochs=(1, 1, 0), **{"trainer.logger": CSV, "run.mlflow": beside})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    rows = rows_of(tmp_path)
    for name in ("train/loss", "val/soft/accuracy", "lr/model", "lr/routers", "results/soft"):
        assert [row[name] for row in rows if row.get(name)], name
    assert (tmp_path / "mlflow.db").exists() is bool(beside)
    about = json.loads((fit.run / "run.json").read_text())
    assert bool(about["run_id"]) is bool(beside)
    if beside:
        run = MlflowClient(about["tracking_uri"]).get_run(about["run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.params["trainer.logger.class"] == "CSVLogger"


def test_mlflow_may_be_left_out(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(epochs=(1, 0, 0), **{"trainer.logger": True, "run.mlflow": False}), "fit")
    assert fit.code == 0, fit.err
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "lightning_logs").exists()  # nor does Lightning make a logger of its own
    wrong = lightning(tmp_path, tiny.config(**{"run.mlflow": True}), "fit")
    assert wrong.code == 1
    assert wrong.err.splitlines()[-1].startswith("error: trainer.logger false and run.mlflow true contradict")


def test_tensorboard(tiny, lightning, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
    )
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "tb"}}
    fit = lightning(tmp_path, tiny.config(epochs=(1, 1, 0), **{"trainer.logger": logger}), "fit")
    assert fit.code == 0, fit.err
    (file,) = tmp_path.glob("tb/**/events.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    assert {"train/loss", "val/soft/accuracy", "lr/routers"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(("logger", "module"), [("WandbLogger", "wandb"), ("TensorBoardLogger", "tensorboard")])
def test_a_missing_package_is_one_line(logger, module, tiny, lightning, tmp_path, monkeypatch):
    from lightning.fabric.loggers import tensorboard
    from lightning.pytorch.loggers import wandb

    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(tensorboard, "_TENSORBOARDX_AVAILABLE", False)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", RequirementCache("wandb-that-is-not-there"))
    arguments = {"save_dir": "x"} if logger == "TensorBoardLogger" else {}
    config = tiny.config(**{"trainer.logger": {"class_path": logger, "init_args": arguments}})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 1
    lines = [line for line in fit.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in fit.err
    assert f'pip install "lte-lightning[{module}]"' in lines[0]

"""Records a run: its folder, its MLflow run, the results and the model."""

import os
import shutil
import sys
import time
import uuid
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.table import Table

from lte_lightning.callbacks.checkpoints import back_to_best, keep_checkpoints_in, write_checkpoints_whole
from lte_lightning.callbacks.module import lte_module
from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.folder import CONFIG_FILE
from lte_lightning.core.model.sharding import whole_state
from lte_lightning.errors import UserError
from lte_lightning.recording import tables
from lte_lightning.recording.latency import measure_latency
from lte_lightning.recording.loggers import RunLogger, mlflow_of, send_files
from lte_lightning.recording.memory import expected_memory
from lte_lightning.recording.pictures import draw_views
from lte_lightning.recording.place import LAST, RUN_FILE, how_to_resume, save_model, task_suffix, write_run_file
from lte_lightning.recording.rows import prediction_rows, write_rows
from lte_lightning.recording.tracking import conclude
from lte_lightning.results import FILE, PROGRESS, Evaluation, Place
from lte_lightning.store import (
    find_run,
    keeps_run,
    mlflow_store,
    named_by_file,
    read_run_file,
    require_writable,
    shown,
    whole,
)
from lte_lightning.tasks.base import LteModule
from lte_lightning.trainer import declared

STOPPED = (KeyboardInterrupt, SIGTERMException)  # a person stopped it, not an error


class Recorder(Callback):
    """Keeps everything of a run in one folder, ``<root>/<experiment>/<run id>``, and the same in MLflow.

    The folder holds ``config.yaml``, ``checkpoints/``, ``artifacts/`` (MLflow's), and at the end of a fit
    ``results.json`` and ``model/``, a Hugging Face folder with the routers.

    Args:
        root: Folder of all runs.
        experiment: Name of the MLflow experiment and of the folder below the root.
        name: Name of the MLflow run; by default task, method, target and seed.
        tracking_uri: MLflow's store; by default ``MLFLOW_TRACKING_URI`` or an embedded ``sqlite:///mlflow.db``. What
            is given here is kept in the run's files: an address with a password is taken from the variable alone.
        floor_from: A ``results.json`` whose ``floor`` (every expert off, adapted alike) is reported with this run's.
        parent: Id of the MLflow run that this one belongs to, a sweep's.
        mlflow: Record in MLflow. By default where trainer.logger names no other logger; true adds MLflow to one that it
            names, false leaves it out.
        log_model: Add the model of a fit to MLflow, too, for ``mlflow.pyfunc.load_model``: a copy of its folder.
        register_as: Name of the registered model in MLflow of which the fit's model becomes a version.
        latency_rows: After a fit, measure how many times as fast as its dense twin the saved model is on so many
            validation rows at a time, on this device: ``speedup`` in the results. Holds two more copies of the model.
    """

    def __init__(
        self,
        root: str = "runs",
        experiment: str = "lte",
        name: str | None = None,
        tracking_uri: str | None = None,
        floor_from: str | None = None,
        parent: str | None = None,
        latency_rows: int | None = None,
        mlflow: bool | None = None,
        log_model: bool = True,
        register_as: str | None = None,
    ) -> None:
        if latency_rows is not None and latency_rows < 1:
            raise UserError(f"latency_rows is {latency_rows}; it is a number of rows, at least 1")
        if tracking_uri and tracking_uri != shown(tracking_uri):
            raise UserError(
                f"run.tracking_uri is {shown(tracking_uri)}, and what *** stands for would be kept in the run's files: "
                "give the whole address by MLFLOW_TRACKING_URI"
            )
        if register_as and not log_model:
            raise UserError("run.register_as registers the model that run.log_model false leaves out; drop one of them")
        self.latency_rows, self.mlflow, self.log_model, self.register_as = latency_rows, mlflow, log_model, register_as
        self.root = Path(root).absolute()
        self.experiment, self.name = experiment, name
        self.tracking_uri = mlflow_store(tracking_uri, os.environ.get("MLFLOW_TRACKING_URI"))
        self.floor = tables.read_floor(floor_from) if floor_from else None
        self.parent = parent
        self.folder: Path | None = None
        self.run_id: str | None = None
        self._named_by: Path | None = None  # the file from which the store's name comes
        self._fresh = False
        self.options: dict[str, Any] | None = None  # the fit's options by name
        self.table: Table | None = None
        self.written: Path | None = None

    # Where the run lives

    def resume(self, origin: str) -> None:
        """Continues the run whose folder contains the checkpoint or the model folder, if there is one.

        Raises:
            UserError: If that run is of another version, or its ``run.json`` is damaged.
        """
        folder = find_run(origin)
        if folder is not None:
            stored = read_run_file(folder)
            self.folder, self.root = folder, folder.parent.parent
            self.experiment = stored["experiment"]
            uri = stored["tracking_uri"]
            if uri == shown(self.tracking_uri):  # no file keeps its password
                uri = self.tracking_uri
            # a copied run's embedded store may have stayed elsewhere: then MLflow gets a new run
            if uri and keeps_run(uri):
                self._own, self._named_by = self.tracking_uri, folder / RUN_FILE
                self.tracking_uri, self.run_id = uri, stored["run_id"]

    @property
    def place(self) -> Path:
        """The folder of the experiment's runs."""
        return self.folder.parent if self.folder else self.root / self.experiment

    def make_logger(self, name: str | None = None) -> Logger:
        """Returns the MLflow logger of this run.

        Args:
            name: The run's name if its options give none; by default the time.

        Raises:
            UserError: If its store's address or password is wrong, or a file names a store that cannot be trusted.
        """
        require_writable(self.place)
        # a name from MLflow would be the same for all runs: it is drawn after the seed is set
        self.name = self.name or name or time.strftime("%Y-%m-%d %H:%M:%S")
        if self._named_by:
            self.tracking_uri = named_by_file(self.tracking_uri, self._own, self._named_by)
        embedded = self.tracking_uri.startswith("sqlite:")  # a server decides where its artifacts are
        return RunLogger(
            whole(self.tracking_uri),
            self.run_id,
            experiment=self.experiment,
            name=self.name,
            location=self.place.as_uri() if embedded else None,
            tags={"mlflow.parentRunId": self.parent} if self.parent else None,
            root=self.place.parent.as_uri() if self._named_by else None,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the run folder and sends the checkpoints there."""
        if declared(trainer).fast_dev_run:
            self.folder = None
            return
        write_checkpoints_whole(trainer)
        if self.floor and (task := getattr(declared(trainer).datamodule, "task", None)) != self.floor.task:
            raise UserError(f"run.floor_from is a floor of {self.floor.task!r}, this run is on {task!r}")
        if (logger := mlflow_of(trainer)) is None:
            require_writable(self.place)
        if self.folder is None:
            run_id = (logger and logger.run_id) or time.strftime("%Y-%m-%d_%H-%M-%S-") + uuid.uuid4().hex[:4]
            run_id = trainer.strategy.broadcast(run_id)  # only the first process has a logger that knows it
            self.folder = self.place / run_id
            self._fresh = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero and not (self.folder / RUN_FILE).exists():
            known = (logger.run_id, shown(self.tracking_uri)) if logger else (None, None)
            write_run_file(self.folder, self.experiment, self.name, *known)
        if isinstance(logger, RunLogger):
            logger.attach(self.folder)
        # Lightning would say so at every resumed fit
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        keep_checkpoints_in(trainer, self.folder / "checkpoints")

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints how to resume from the last checkpoint. A refused run leaves no files."""
        if isinstance(logger := mlflow_of(trainer), RunLogger) and isinstance(exception, STOPPED):
            logger.ending = "KILLED"
        if self.folder is None:
            if isinstance(exception, UserError):
                self.forget(mlflow_of(trainer))
            return
        if trainer.state.fn == "fit" and (self.folder / LAST).exists():
            print(f"\nStopped. {how_to_resume(self.folder)}", file=sys.stderr)
        elif self._fresh and isinstance(exception, UserError):
            self.forget(mlflow_of(trainer))
        elif trainer.state.fn == "fit":
            print("\nStopped before the first epoch was finished: there is nothing to resume.", file=sys.stderr)

    def forget(self, logger: RunLogger | MLFlowLogger | None) -> None:
        """Removes the files of a refused run. A continued run keeps its files."""
        if self._fresh and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(logger, RunLogger) and self.run_id is None:
            logger.forget()
        elif logger is not None and self.run_id is None:
            logger.experiment.delete_run(logger.run_id)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the memory that the fit is expected to take."""
        rank_zero_info(f"expected memory per device: {expected_memory(trainer, lte_module(pl_module))}")

    @rank_zero_only
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the fit's progress, which ``lte sweep`` shows."""
        if self.folder is not None:
            stage, number, epochs = lte_module(pl_module).schedule.place(trainer.current_epoch)
            assert trainer.max_epochs is not None  # the schedule has set it
            Place(stage, number + 1, epochs, trainer.current_epoch, trainer.max_epochs).write(self.folder)

    # Results

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the best checkpoint if the fit reached the expert stage, then exports model and results."""
        if self.folder is None:
            return
        module = lte_module(pl_module)
        back_to_best(trainer, module)
        module.before_export()
        state = whole_state(module.net) if is_sharded(module.net) else None
        if trainer.is_global_zero:
            self._export(trainer, module, self.folder, state)

    def _export(self, trainer: Trainer, module: LteModule, folder: Path, state: dict[str, Any] | None) -> None:
        results = tables.make_results(trainer, module, self.floor.floor if self.floor else None, self.options)
        about = {"stage": module.stage, "measured": module.measured, **tables.facts_for_card(results, module.hparams)}
        save_model(module.net, folder / "model", about, getattr(declared(trainer).datamodule, "tokenizer", None), state)
        if self.latency_rows and module.stage != "dense":
            results = replace(results, **measure_latency(folder / "model", trainer, self.latency_rows, module.backend))
        missed = tables.warn_of_missed_target(results, lte_config(module.net))
        self.table = tables.results_table(results, missed, tables.warn_of_constant_answers(module))
        self.written = folder / FILE
        results.write(self.written)
        (folder / PROGRESS).unlink(missing_ok=True)
        files = [self.written]
        if views := module.measured.get("hard") or module.measured.get("hard_before"):
            files += draw_views(views, lte_config(module.net).threshold, folder)
        send_files(trainer, folder / "model" / CONFIG_FILE, to="model")
        send_files(trainer, *files)
        conclude(trainer, module, results, self.log_model, self.register_as)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``test.json``: metric, sparsity overall and per layer, cost per token.

        A test on another task than the fit's writes ``test-<task>.json``, and keeps the file of the fit's own task.
        """
        module = lte_module(pl_module)
        evaluation = Evaluation.of(module.measured["test"])
        if self.folder is not None:
            suffix = task_suffix(self.folder, getattr(declared(trainer).datamodule, "task", None))
            self.written = self.folder / f"test{suffix}.json"
            evaluation.write(self.written)
            send_files(trainer, self.written)
            self._write_rows(trainer, f"predictions{suffix}.jsonl", module.predictions)
        task = getattr(declared(trainer).datamodule, "task", "")
        self.table = tables.test_table(task, evaluation, tables.warn_of_constant_answers(module, ("test",)))

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the answers that a model wrote for reading to ``samples.jsonl``."""
        module = lte_module(pl_module)
        self._write_rows(trainer, "samples.jsonl", module.samples, append=True)
        module.samples = []

    def _write_rows(self, trainer: Trainer, name: str, rows: list[dict[str, Any]], append: bool = False) -> None:
        if self.folder is not None and rows:
            write_rows(self.folder / name, rows, append)
            send_files(trainer, self.folder / name)

    @rank_zero_only
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``predictions.jsonl``, one row per example in the data's order, and one file per set of a task."""
        if self.folder is None:
            return
        name = f"predictions{task_suffix(self.folder, getattr(declared(trainer).datamodule, 'task', None))}"
        loop = trainer.predict_loop
        batches_of = loop.predictions if loop.num_dataloaders > 1 else [loop.predictions]
        for suffix, batches in zip(lte_module(pl_module).loader_names, batches_of, strict=False):
            self._write_rows(trainer, f"{name}{suffix}.jsonl", prediction_rows(batches))
        self.written = self.folder / f"{name}.jsonl"

    @rank_zero_only
    def report(self) -> None:
        """Prints the table of a fit or a test, then the path of its file."""
        if self.table is not None:
            tables.show(self.table)
        if self.written is not None:
            print(self.written, flush=True)

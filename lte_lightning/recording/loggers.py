"""The MLflow logger of a run. A fit goes on without MLflow if the store fails."""

import re
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lte_lightning.errors import UserError
from lte_lightning.network import AwayError, failures
from lte_lightning.recording.unsent import keep, note_run, now, open_run, send, send_all
from lte_lightning.store import reason, shown
from lte_lightning.trainer import is_first_process

PAUSE = 60.0  # seconds before a store that failed is tried again, or ten times as long as it took to fail
STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class RunLogger(Logger):
    """Sends records to MLflow, and keeps them in the run's folder while the store is out of reach.

    The logger tries the store again from time to time, and at the run's end. Resuming the run or ``lte sync RUN`` sends
    the records that still wait then. A run keeps the parameters of its start, because MLflow allows no change. An
    evaluation may have other options than the fit whose run it continues.

    Args:
        uri: MLflow's store.
        run_id: The run to continue.
        **origin: ``experiment``, ``name``, ``location`` of artifacts, ``tags`` and ``root`` of a new run.

    Raises:
        UserError: If the address or the password is wrong.
    """

    def __init__(self, uri: str, run_id: str | None = None, **origin: Any) -> None:
        super().__init__()
        self.uri, self.run_id, self.origin = uri, run_id, origin
        self.folder: Path | None = None
        self.options: dict[str, Any] = {}  # the options of the whole run, beside the module's own parameters
        self.ending: str | None = None  # the end status for MLflow, whatever Lightning says
        self.client: Any = None
        self._early: list[dict[str, Any]] = []  # until there is a folder
        self._warned = self._behind = self._forgotten = False
        self._again = 0.0
        if not is_first_process():
            return
        began = time.monotonic()
        try:
            self.client, self.run_id = open_run(uri, run_id, origin)
        except failures() as error:
            if isinstance(error, UserError) and not isinstance(error, AwayError):
                raise
            self._lose(error, began)

    def attach(self, folder: Path) -> None:
        """Names the run's folder, and sends the records that wait there."""
        self.folder, self._behind = folder, True
        if is_first_process():
            self.tell()

    def tell(self, **entry: Any) -> None:
        """Sends an entry (see `send`), or keeps it."""
        if not is_first_process() or self._forgotten:
            return
        began, entries = time.monotonic(), [{"time": now()} | entry] if entry else []
        if self.client is None and began < self._again:
            self._keep(entries)
            return
        try:
            if self.client is None:
                self.client, self.run_id = open_run(self.uri, self.run_id, self.origin)
            assert self.run_id is not None  # set together with the client
            if self._behind and self.folder is not None:
                self._keep([])
                note_run(self.folder, self.run_id, self.uri)
                send_all(self.client, self.run_id, self.folder)
                self._behind = False
            for waiting in entries:
                send(self.client, self.run_id, self.folder, waiting)
        except failures() as error:
            self._lose(error, began)
            self._keep(entries)

    def _keep(self, entries: list[dict[str, Any]]) -> None:
        self._early += entries
        if self.folder is not None and self._early:
            begin = [] if self.run_id else [{"begin": {"tags": self.origin.get("tags")}}]
            keep(self.folder, begin + self._early)
            self._early = []

    def _lose(self, error: Exception, began: float) -> None:
        self.client, self._behind = None, True
        lost = time.monotonic()
        self._again = lost + max(PAUSE, 10 * (lost - began))
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"MLflow's store {shown(self.uri)} cannot be used: {reason(error)}. The run goes on without it, and "
                "keeps what it records in its folder; that is sent when the store is back, or by lte sync RUN"
            )

    def forget(self) -> None:
        """Removes the run from MLflow, and neither sends nor keeps further records of it."""
        if self.client is not None:
            self.client.delete_run(self.run_id)
        self._forgotten = True

    # The interface that Lightning requires of a logger

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.origin["experiment"]

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def experiment(self) -> Any:
        """MLflow's client; None while the store is out of reach."""
        return self.client

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends metrics under names that MLflow accepts."""
        names = {re.sub("[^a-zA-Z0-9_/. -]+", "", key): float(value) for key, value in metrics.items()}
        self.tell(metrics=names, step=step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Sends the parameters, unless the run already has some."""
        flat = self.options | _flatten_dict(_convert_params(params))
        self.tell(params={key: str(value)[:250] for key, value in flat.items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run, and tries a store that has failed once more."""
        self._again = 0.0
        self.tell(status=self.ending or STATUS.get(status, status))


def mlflow_of(trainer: Trainer) -> RunLogger | MLFlowLogger | None:
    """Returns the trainer's MLflow logger, if it has one: ours, or one that the user named."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger | MLFlowLogger)), None)


def send_files(trainer: Trainer, *files: Path, to: str | None = None) -> None:
    """Adds files of the run's folder to its run in MLflow, if it has one."""
    logger = mlflow_of(trainer)
    for file in files:
        if isinstance(logger, RunLogger):
            assert logger.folder is not None  # the recorder attaches it when the fit is set up
            logger.tell(file=str(file.relative_to(logger.folder)), to=to)
        elif logger is not None:
            logger.experiment.log_artifact(logger.run_id, str(file), to)

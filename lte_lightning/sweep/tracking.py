"""MLflow's view of a sweep: a parent run, whose children are the points."""

import contextlib
import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

from lte_lightning.core.errors import UserError
from lte_lightning.store import first_contact
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.network import reach
from lte_lightning.sweep.spec import Point

PARAMETER_LENGTH = 500  # MLflow's own limit is larger; the whole is in the child's config.yaml


class Tracker:
    """Keeps the parent run of a sweep, and tells the points that they belong to it.

    Args:
        folder: The sweep's folder, held. It remembers the parent run, which a resumed sweep continues.
        uri: MLflow's store; by default ``MLFLOW_TRACKING_URI``, or an embedded ``sqlite:///mlflow.db``.

    Raises:
        UserError: If the store does not answer.
    """

    def __init__(self, folder: SweepFolder, uri: str | None = None) -> None:
        known = folder.about.get("mlflow", {})
        uri = known.get("uri") or uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        if uri.startswith("sqlite:///"):
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
        self.folder, self.uri = folder, uri
        if uri.startswith(("http://", "https://")):
            reach(uri, "the MLflow server")  # MLflow itself would try for minutes
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from sqlalchemy.exc import SQLAlchemyError

        self._errors = (MlflowException, SQLAlchemyError, OSError)
        try:
            with first_contact(uri):
                self.client = MlflowClient(uri)
                self.parent = self._parent(known.get("parent"))
        except self._errors as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"MLflow's store {uri} cannot be used: {reason}; is it locked by another process, "
                "or from another version of MLflow? Name another by MLFLOW_TRACKING_URI, or record nothing with "
                "--trainer.logger false"
            ) from error
        folder.about["mlflow"] = {"uri": uri, "parent": self.parent}
        folder.save()

    def _parent(self, known: str | None) -> str:
        if known is not None:
            with contextlib.suppress(*self._errors):
                self.client.update_run(known, status="RUNNING")
                return known
        name = self.folder.path.name
        experiment = self.client.get_experiment_by_name(name)
        # a server decides where its artifacts are; beside a database of ours they lie in the runs' folders
        location = self.folder.path.as_uri() if self.uri.startswith("sqlite:") else None
        if experiment is None:
            identity = self.client.create_experiment(name, artifact_location=location)
        elif location and experiment.artifact_location != location:
            raise UserError(
                f"experiment {name!r} in {self.uri} keeps its runs in {experiment.artifact_location}, not in "
                f"{location}; choose another --folder, or another MLFLOW_TRACKING_URI"
            )
        else:
            identity = experiment.experiment_id
        tags = {"lte.sweep": str(self.folder.about["name"])} | _git()
        return self.client.create_run(identity, tags=tags, run_name=f"sweep {name}").info.run_id

    def options(self) -> dict[str, Any]:
        """Returns the options that make a fit a child of the sweep's run."""
        return {"run.tracking_uri": self.uri, "run.parent": self.parent}

    def point_done(self, point: Point, run: Path) -> None:
        """Adds what the sweep set, and what the point is in it, to a point's run."""
        from mlflow.entities import Param, RunTag

        run_id = json.loads((run / "run.json").read_text())["run_id"]
        if run_id is None:
            return
        values = {"seed": point.seed} | point.overrides
        found = [Param(f"point/{key}", str(value)[:PARAMETER_LENGTH]) for key, value in values.items()]
        tags = {"lte.point": point.name, "lte.role": point.role, "lte.variant": point.variant} | _git()
        with self._warn(f"the parameters of {point.name}"):
            known = [RunTag(key, value) for key, value in tags.items() if value is not None]
            self.client.log_batch(run_id, params=found, tags=known)

    def forget(self, run_id: str) -> None:
        """Removes the run of an attempt that left nothing."""
        with contextlib.suppress(*self._errors):
            self.client.delete_run(run_id)

    def end(self, files: list[Path], failed: bool) -> None:
        """Adds files to the parent run, and ends it."""
        with self._warn("the sweep's table"):
            for file in files:
                self.client.log_artifact(self.parent, str(file))
            self.client.set_terminated(self.parent, "FAILED" if failed else "FINISHED")

    @contextlib.contextmanager
    def _warn(self, what: str) -> Any:
        # The figures are in the sweep's folder: a store that went away is no reason to stop
        try:
            yield
        except self._errors as error:
            warnings.warn(f"MLflow's store {self.uri} did not take {what}: {error}", stacklevel=3)


def _git() -> dict[str, str]:
    """The version of the code, if it lies in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"lte.git": found.stdout.strip()}

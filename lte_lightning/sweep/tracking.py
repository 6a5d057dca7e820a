"""MLflow's view of a sweep: a parent run, whose children are the points."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.files import write_json
from lte_lightning.network import new_run, try_store
from lte_lightning.results import FILE, Results, read_results
from lte_lightning.store import first_contact, mlflow_store, named_by_file, read_run_file, reason, shown, whole
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point

PLAN = "plan.json"  # of the parent run: its points, whole, so that readers know the unfinished ones
PARAMETER_LENGTH = 500  # MLflow's own limit is larger; the whole is in the child's config.yaml


class Tracker:
    """Keeps the parent run of a sweep, and tells the points that they belong to it.

    Args:
        folder: The sweep's folder, held. It remembers the parent run, which a resumed sweep continues.
        uri: MLflow's store that the fits' configurations name, if they do. ``MLFLOW_TRACKING_URI`` goes before it; by
            default it is the store of before, or an embedded ``sqlite:///mlflow.db``.

    Raises:
        UserError: If the store does not answer.
    """

    def __init__(self, folder: SweepFolder, uri: str | None = None) -> None:
        known = folder.about.get("mlflow", {})
        typed = os.environ.get("MLFLOW_TRACKING_URI") or uri
        uri = mlflow_store(typed) if typed else named_by_file(known.get("uri"), mlflow_store(), folder.path)
        # A sweep that changed its store and comes back finds its parent there
        parents = known.get("parents", {}) | ({known["uri"]: known["parent"]} if known else {})
        self.folder, self.uri, self.name = folder, whole(uri), shown(uri)  # files and messages have the second
        instead = "name another by MLFLOW_TRACKING_URI, or record nothing with --trainer.logger false"
        try_store(uri, instead)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from sqlalchemy.exc import SQLAlchemyError

        self._errors = (MlflowException, SQLAlchemyError, OSError)
        try:
            with first_contact(uri):
                self.client = MlflowClient(uri)
                self.parent = self._parent(parents.get(self.name))
        except (*self._errors, ImportError) as error:
            raise UserError(f"MLflow's store {self.name} cannot be used: {reason(error)}; {instead}") from None
        parents |= {self.name: self.parent}
        folder.about["mlflow"] = {"uri": self.name, "parent": self.parent, "parents": parents}
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
            experiment_id = self.client.create_experiment(name, artifact_location=location)
        elif location and experiment.artifact_location != location:
            raise UserError(
                f"experiment {name!r} in {self.name} keeps its runs in {experiment.artifact_location}, not in "
                f"{location}; choose another --folder, or another MLFLOW_TRACKING_URI"
            )
        else:
            experiment_id = experiment.experiment_id
        return new_run(self.client, self.uri, experiment_id, run_name=f"sweep {name}")

    def options(self) -> dict[str, Any]:
        """Returns the options that make a fit a child of the sweep's run."""
        # An address with a password comes from the environment, which the fit has, too
        place = {"run.tracking_uri": self.uri if self.uri == self.name else None, "run.parent": self.parent}
        return place | {"run.log_model": False}  # a second copy of each point's model

    def point_done(self, point: Point, run: Path) -> bool:
        """Adds the sweep's options and the point's role to its run; says whether MLflow took them.

        A fit that was killed after its results were written did not end its run: that is done for it.
        """
        from mlflow.entities import Param, RunTag

        run_file, results = read_run_file(run), read_results(run)
        run_id = run_file["run_id"]
        if run_id is None or run_file["tracking_uri"] != self.name:
            return True  # it records nothing, or elsewhere
        values = {"seed": point.seed} | point.overrides
        tags = {"lte.point": point.name, "lte.role": point.role, "lte.variant": point.variant}
        tags |= {"lte.parameters": json.dumps(point.parameters)} | _code([results])

        def tell() -> None:
            stored_run = self.client.get_run(run_id)
            params = {f"point/{key}": str(value)[:PARAMETER_LENGTH] for key, value in values.items()}
            new = [Param(key, value) for key, value in params.items() if key not in stored_run.data.params]
            self.client.log_batch(
                run_id, params=new, tags=[RunTag(key, value) for key, value in tags.items() if value is not None]
            )
            if stored_run.info.status != "FINISHED":
                self._finish(run_id, run, results)

        return self._try(f"the parameters of {point.name}", tell)

    def _finish(self, run_id: str, run: Path, results: Results) -> None:
        from mlflow.entities import Metric

        there = {file.path for file in self.client.list_artifacts(run_id)}
        for file in (run / FILE, *sorted(run.glob("*.png"))):
            if file.name not in there:
                self.client.log_artifact(run_id, str(file))
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, [Metric(key, value, now, 0) for key, value in results.metrics().items()])
        self.client.set_terminated(run_id, "FINISHED")

    def adopt(self, run: Path) -> None:
        """Makes a run in the sweep's store for a resumed fit, if it has none there.

        It began in another store, or the store's database was replaced since.
        """
        run_file = read_run_file(run)
        if run_file["run_id"] is None:
            return

        def tell() -> None:
            if run_file["tracking_uri"] == self.name and self._has(run_file["run_id"]):
                return
            experiment = self.client.get_run(self.parent).info.experiment_id
            tags = {"mlflow.parentRunId": self.parent}
            child = self.client.create_run(experiment, tags=tags, run_name=run_file["name"])
            write_json(run / "run.json", run_file | {"run_id": child.info.run_id, "tracking_uri": self.name})

        self._try(f"that {run_file['name']} goes on", tell)

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def forget(self, run_id: str) -> None:
        """Removes the run of an attempt that left nothing."""
        with contextlib.suppress(*self._errors):
            self.client.delete_run(run_id)

    def begin(self) -> None:
        """Notes in the parent run which sweep it is, the command that was typed last, and the points that it plans."""
        about = self.folder.about
        last = about["commands"][-1] if about.get("commands") else {}
        tags = {"lte.sweep": about["name"], "lte.command": last.get("command"), "lte.folder": last.get("folder")}

        def tell() -> None:
            self._tag(tags)
            if plan := about.get("plan"):
                self.client.log_dict(self.parent, {"points": plan}, PLAN)

        self._try("the sweep's command", tell)

    def end(self, files: list[Path], failed: bool) -> None:
        """Adds files to the parent run, and the versions of the code that its fits were run with; ends it."""
        attempts = self.folder.attempts()
        runs = [run for name in attempts if (run := self.folder.finished(name, attempts))]

        def tell() -> None:
            self._tag(_code([read_results(run) for run in runs]))
            for file in files:
                self.client.log_artifact(self.parent, str(file))
            self.client.set_terminated(self.parent, "FAILED" if failed else "FINISHED")

        self._try("the sweep's table", tell)

    def _tag(self, tags: dict[str, Any]) -> None:
        for key, value in tags.items():
            if value is not None:
                self.client.set_tag(self.parent, key, value)

    def _try(self, subject: str, tell: Callable[[], None]) -> bool:
        # The results are in the sweep's folder: a lost store is no reason to stop
        try:
            tell()
        except self._errors as error:
            warnings.warn(f"MLflow's store {self.name} did not take {subject}: {reason(error)}", stacklevel=3)
            return False
        return True


def _code(fits: list[Results]) -> dict[str, str]:
    """Returns the code of the fits: its commit, if it lay in its own repository, and a hash of its files."""
    tags: dict[str, str] = {}
    for tag, key in (("lte.git", "commit"), ("lte.code", "code")):
        if versions := {str(fit.versions[key]) for fit in fits if fit.versions.get(key)}:
            tags[tag] = ", ".join(sorted(versions))
    return tags

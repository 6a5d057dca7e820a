"""Reads the material of a report from MLflow: finished runs and their artifacts."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.files import write_json
from lte_lightning.network import try_store
from lte_lightning.report.collect import finish, read_run
from lte_lightning.report.experiments import OLDER
from lte_lightning.report.material import Material
from lte_lightning.report.missing import missing_point
from lte_lightning.report.tested import TESTS
from lte_lightning.results import FILE as RESULTS
from lte_lightning.store import RUN_LAYOUT, mlflow_store, reason, shown
from lte_lightning.sweep.points import Point, restore
from lte_lightning.sweep.table import newest
from lte_lightning.sweep.tracking import PLAN

# The artifacts that `read_run` reads
FILES = (RESULTS, "config.yaml", "model/lte_config.json")
PARENT = "mlflow.parentRunId"
OTHER = "name another with --tracking-uri"


def collect_tracked(
    uri: str | None, experiment: str | None = None, run_ids: Sequence[str] = (), bench: Iterable[str | Path] = ()
) -> Material:
    """Reads finished fits from MLflow's store, and CSV files of ``lte bench``.

    Args:
        uri: The store; by default ``MLFLOW_TRACKING_URI``, or ``sqlite:///mlflow.db``.
        experiment: Reports all finished runs of this experiment.
        run_ids: Reports these runs in place of an experiment; the run of a sweep stands for all its fits.
        bench: See `collect`.

    Raises:
        UserError: If the store does not answer, has no such experiment or run, or a named run has no results.
    """
    if experiment is not None and run_ids:
        raise UserError(f"both --experiment {experiment} and the run {run_ids[0]} are given; name only one of them")
    uri = mlflow_store(uri, os.environ.get("MLFLOW_TRACKING_URI"))
    with _store(uri) as client, tempfile.TemporaryDirectory(prefix="lte-report-") as folder:
        runs = _runs(client, shown(uri), experiment, run_ids)
        finished = [run for run in runs if _fetch(client, run, Path(folder) / run.info.run_id)]
        finished_points = {_point(run) for run in finished}
        unfinished = [run for run in runs if run not in finished]
        for run in unfinished:
            if run.info.run_id in run_ids:
                raise UserError(
                    f"run {run.info.run_id} ({_name(run)}) has no results.json: it is {_status(run)}; leave it out"
                )
        if not finished:
            name = experiment or ", ".join(run_ids)
            raise UserError(f"none of the {len(runs)} runs of {name} is a finished fit; name others")
        waited = [run for run in unfinished if _point(run) not in finished_points]
        plans = {parent: _plan(client, parent) for parent in {run.data.tags.get(PARENT, "") for run in waited}}
        missing = [
            missing_point(_name(run), plans[parent].get(_name(run)), parent, _status(run))
            for run in waited
            for parent in [run.data.tags.get(PARENT, "")]
        ]
        material = Material(missing=missing)
        _read(finished, Path(folder), material)
        return finish(material, bench)


@contextlib.contextmanager
def _store(uri: str) -> Iterator[Any]:
    """Yields a client of the store, and turns its errors into one line."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists():
        raise UserError(f"there is no MLflow database {uri}; {OTHER}")  # or MLflow creates it
    try_store(uri, OTHER)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    try:
        yield MlflowClient(uri)
    except UserError:
        raise
    except Exception as error:  # MLflow's client raises many types for an unexpected reply
        raise UserError(f"MLflow's store {shown(uri)} cannot be read: {reason(error)}; {OTHER}") from None


def _runs(client: Any, store: str, experiment: str | None, run_ids: Sequence[str]) -> list[Any]:
    """Returns the requested runs, oldest first, without the parent runs of sweeps."""
    if experiment is None and run_ids:
        runs = [run for run_id in dict.fromkeys(run_ids) for run in _run(client, store, run_id)]
    else:
        entry = client.get_experiment_by_name(experiment) if experiment else None
        if entry is None:
            names = sorted(other.name for other in client.search_experiments())
            problem = f"there is no experiment {experiment!r} in {store}" if experiment else f"which runs of {store}?"
            raise UserError(f"{problem}; name one by --experiment, or runs by their ids; it has {', '.join(names)}")
        runs = _search(client, entry.experiment_id)
    unique = {run.info.run_id: run for run in runs if "lte.sweep" not in run.data.tags}
    return sorted(unique.values(), key=lambda run: run.info.start_time)


def _run(client: Any, store: str, run_id: str) -> list[Any]:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"there is no run {run_id!r} in {store}; give the id of one, or --experiment NAME") from error
    if "lte.sweep" not in run.data.tags:
        return [run]
    return _search(client, run.info.experiment_id, f"tags.`{PARENT}` = '{run_id}'")


def _search(client: Any, experiment: str, filter_string: str = "") -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], filter_string, page_token=token)
        runs, token = runs + list(page), page.token
        if not token:
            return runs


def _fetch(client: Any, run: Any, folder: Path) -> bool:
    """Downloads the artifacts of a run as a run folder; returns whether it has results."""
    there = {file.path for part in (None, "model") for file in client.list_artifacts(run.info.run_id, part)}
    if run.info.status != "FINISHED" or RESULTS not in there:
        return False
    for name in (*FILES, *(file for file in there if fnmatch(file, TESTS))):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if name in there:
            # stores differ in whether they keep an artifact's folders
            Path(client.download_artifacts(run.info.run_id, name, str(target.parent))).replace(target)
    write_json(folder / "run.json", {"layout": RUN_LAYOUT, "name": _name(run), "run_id": run.info.run_id})
    for name in (RESULTS, "run.json"):  # which of two runs is newer
        os.utime(folder / name, (run.info.end_time / 1000,) * 2)
    return True


def _read(runs: Sequence[Any], folder: Path, material: Material) -> None:
    """Reads run folders. If a sweep's point has several runs, only the newest counts."""
    points: dict[Any, list[Any]] = {}
    for run in runs:
        points.setdefault(_point(run), []).append(run)
    for same in points.values():
        latest = max(same, key=lambda run: newest(folder / run.info.run_id))
        material.left_out += [(run.info.run_id, OLDER) for run in same if run is not latest]
        # the whole configuration distinguishes the fits of a sweep, too
        tags = latest.data.tags
        facts = tags.get("lte.role"), tags.get("lte.variant"), json.loads(tags.get("lte.parameters", "{}"))
        config = f"mlflow artifacts download --run-id {latest.info.run_id} --artifact-path config.yaml --dst-path ."
        command = f"{config} && lightning fit --config config.yaml"
        material.runs.append(read_run(folder / latest.info.run_id, *facts, command=command))


def _plan(client: Any, parent: str) -> dict[str, Point | None]:
    """Returns the points of a sweep by name, if its parent run has saved them; an unfinished parent has not."""
    if not parent or PLAN not in {file.path for file in client.list_artifacts(parent)}:
        return {}
    with tempfile.TemporaryDirectory(prefix="lte-plan-") as folder:
        stored = json.loads(Path(client.download_artifacts(parent, PLAN, folder)).read_text())["points"]
    return {point.name: point for content in stored if (point := restore(content))}


def _name(run: Any) -> str:
    return run.data.tags.get("lte.point") or run.info.run_name or run.info.run_id


def _point(run: Any) -> tuple[str, str]:
    """Returns the key that all attempts at a sweep's point share; a run outside of sweeps has its own."""
    parent = run.data.tags.get(PARENT)
    return (parent, _name(run)) if parent else (run.info.run_id, "")


def _status(run: Any) -> str:
    if run.info.status == "FINISHED":
        return "finished without a fit's results"
    return "running or killed" if run.info.status == "RUNNING" else run.info.status.lower()

"""Keeps the records that MLflow did not accept in the run's folder, and sends them later."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lte_lightning.errors import UserError
from lte_lightning.files import abridged, write_json
from lte_lightning.network import failures, new_run, try_store
from lte_lightning.store import first_contact, named_by_file, read_run_file, reason, shown, users_store

UNSENT = "unsent.jsonl"
CHUNK = 100  # parameters that MLflow accepts at a time


def keep(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries to the waiting ones in a run's folder, in place of a last line that was cut short.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        with (folder / UNSENT).open("a+b") as file:
            _drop_torn_line(file)
            file.writelines((json.dumps(entry) + "\n").encode() for entry in entries)
    except OSError as error:
        raise UserError(f"cannot write {folder / UNSENT}: {error.strerror}") from error


def _drop_torn_line(file: BinaryIO) -> None:
    """Drops what a process that was killed, or whose disk was full, wrote of its last line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the waiting entries of a run's folder, except for a last line that was cut short.

    Raises:
        UserError: If the file is damaged.
    """
    if not (folder / UNSENT).exists():
        return
    lines = (folder / UNSENT).read_text("utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no mapping")
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise UserError(f"{folder / UNSENT}, line {number}, is damaged: {error}; remove the line") from error
        yield entry


def open_run(uri: str, run_id: str | None, origin: dict[str, Any]) -> tuple[Any, str]:
    """Returns a client of a store and a run's id: the named run if the store has it, or else a new run.

    Args:
        uri: MLflow's store.
        run_id: The run to continue.
        origin: ``experiment``, ``name``, ``location`` of artifacts and ``tags`` of a new run.

    Raises:
        UserError: If the address or the password is wrong, or the experiment keeps its runs elsewhere.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from mlflow.tracking.context.registry import resolve_tags

    try_store(uri)
    with first_contact(uri):
        try:
            client = MlflowClient(uri)
            if run_id is not None and _has(client, run_id, origin.get("root"), uri):
                return client, run_id
            experiment, location = client.get_experiment_by_name(origin["experiment"]), origin.get("location")
            if experiment is None:
                identity = client.create_experiment(origin["experiment"], artifact_location=location)
            elif location and experiment.artifact_location != location:
                raise UserError(
                    f"experiment {origin['experiment']!r} in {shown(uri)} keeps its runs in "
                    f"{experiment.artifact_location}, not in {location}; choose another run.experiment, run.root or "
                    "run.tracking_uri"
                )
            else:
                identity = experiment.experiment_id
            tags = resolve_tags(origin.get("tags") or {})
            return client, new_run(client, uri, identity, tags=tags, run_name=origin.get("name"))
        except (MlflowException, ImportError) as error:
            if _is_mistake(error):
                raise UserError(
                    f"MLflow's store {shown(uri)} refuses: {reason(error)}; correct MLFLOW_TRACKING_URI, "
                    "MLFLOW_TRACKING_USERNAME and _PASSWORD, or record nothing with --trainer.logger false"
                ) from None  # a client's own error may show an address with its password
            raise


def _has(client: Any, run_id: str, root: str | None, uri: str) -> bool:
    """Says whether a store has a run, and whether its artifacts lie where we may write."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path

    try:
        artifacts = client.get_run(run_id).info.artifact_uri
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if root is None:
        return True
    # A database that came with the run must choose neither which of our files get overwritten, nor a server for them
    if urlsplit(artifacts).scheme not in ("", "file"):
        return not uri.startswith("sqlite")
    return (
        Path(local_file_uri_to_path(artifacts)).resolve().is_relative_to(Path(local_file_uri_to_path(root)).resolve())
    )


def _is_mistake(error: Exception) -> bool:
    kind, text = type(error).__name__, str(error)
    codes = ("UNAUTHENTICATED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND")
    wrong = any(f"error code {status}" in text for status in (401, 403, 404))
    return isinstance(error, ImportError) or "URI" in kind or getattr(error, "error_code", "") in codes or wrong


def send(client: Any, run_id: str, folder: Path | None, entry: dict[str, Any]) -> None:
    """Sends an entry: metrics, parameters of a run that has none yet, tags, data, a file, a model, or the run's end.

    Sending an entry twice changes nothing.

    Raises:
        UserError: If a file does not lie in the run's folder.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    if metrics := entry.get("metrics"):
        when, step = int(entry["time"]), int(entry.get("step") or 0)
        client.log_batch(run_id, [Metric(key, float(value), when, step) for key, value in metrics.items()])
    if (params := entry.get("params")) and not client.get_run(run_id).data.params:
        pairs = [Param(key, str(value)[:250]) for key, value in params.items()]
        for first in range(0, len(pairs), CHUNK):
            client.log_batch(run_id, params=pairs[first : first + CHUNK])
    if tags := entry.get("tags"):
        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    if data := entry.get("data"):
        data = data | {"profile": json.dumps(data["profile"]), "source": json.dumps({"uri": data["source"]})}
        client.log_inputs(run_id, [DatasetInput(Dataset(**data), [InputTag("mlflow.data.context", "training")])])
    if (name := entry.get("file")) and folder is not None and (file := _inside(folder, name)).exists():
        client.log_artifact(run_id, str(file), entry.get("to"))
    if (model := entry.get("model")) and folder is not None and (saved := _inside(folder, model["folder"])).exists():
        from lte_lightning.recording.flavour import log_model

        log_model(client, run_id, saved, model["columns"], model["kind"], model["register_as"])
    if status := entry.get("status"):
        client.set_terminated(run_id, status)


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / UNSENT} names {name!r}, which is not in the run's folder; remove that line")
    return file


def sync(folder: Path) -> int:
    """Sends the waiting records of a run's folder, and returns their number.

    Raises:
        UserError: If it is no run's folder, or its store is unusable or refuses the records; all records stay then.
    """
    if not (folder / "run.json").exists():
        raise UserError(f"{folder} is no run's folder: it has no run.json")
    about, entries = read_run_file(folder), list(read(folder))
    if not entries:
        return 0
    uri = named_by_file(about["tracking_uri"], users_store(), folder / "run.json")
    origin = {
        "tags": _tags_of(entries, folder),
        "experiment": about["experiment"],
        "name": about.get("name"),
        "location": folder.parent.as_uri() if uri.startswith("sqlite:") else None,
        "root": folder.parent.parent.as_uri(),
    }
    try:
        client, run_id = open_run(uri, about["run_id"], origin)
        note_run(folder, run_id, uri)
        send_all(client, run_id, folder)
    except UserError:
        raise
    except failures() as error:
        raise UserError(f"MLflow's store {shown(uri)} did not take it: {reason(error)}; try again later") from None
    return len(entries)


def _tags_of(entries: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Returns the tags of a run that is to begin."""
    begin: Any = next((entry["begin"] for entry in entries if "begin" in entry), {})
    tags = begin.get("tags") if isinstance(begin, dict) else begin
    if not isinstance(tags, dict | None) or any(not isinstance(value, str) for value in (tags or {}).values()):
        raise UserError(f"{folder / UNSENT} is damaged: its run begins with {abridged(begin)}; remove that line")
    return tags or {}


def send_all(client: Any, run_id: str, folder: Path) -> None:
    """Sends the waiting records of a run's folder, and removes them once MLflow has accepted all.

    Raises:
        UserError: If an entry is none that can be sent; the file may come from anybody.
    """
    for number, entry in enumerate(read(folder), 1):
        try:
            send(client, run_id, folder, entry)
        except Exception as error:  # whatever MLflow makes of values of other types
            is_store = isinstance(error, failures())
            if is_store and getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                raise
            why = f"{type(error).__name__}: {reason(error)}"
            raise UserError(f"{folder / UNSENT}, line {number}, cannot be sent ({why}); remove the line") from None
    (folder / UNSENT).unlink(missing_ok=True)


def note_run(folder: Path, run_id: str, uri: str) -> None:
    """Notes the MLflow run's id and store in ``run.json``."""
    about = read_run_file(folder)
    if about.get("run_id") != run_id:
        write_json(folder / "run.json", about | {"run_id": run_id, "tracking_uri": shown(uri)})


def now() -> int:
    """Returns the time in milliseconds, as MLflow counts it."""
    return int(time.time() * 1000)

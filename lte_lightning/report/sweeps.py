"""Reads a sweep's folder: which of its runs count, and which points are not done."""

import os
from dataclasses import dataclass
from pathlib import Path

from lte_lightning.report.missing import Missing, missing_point
from lte_lightning.results import FILE
from lte_lightning.sweep.folder import FRONT, SWEEP_FILE, SweepFolder, read_sweep_file
from lte_lightning.sweep.points import Point
from lte_lightning.sweep.record import Record

REASON = 160  # characters of a log's line


@dataclass
class SweptFolder:
    """A sweep's folder, read.

    Args:
        path: The folder.
        text: The sweep's description.
        points: Its points by name, in the order of the sweep's file; None for a point that was never started, if an
            earlier version kept only its name.
        commands: The command of each point that was started.
        obsolete: Names of points that are no longer in the sweep's file.
        missing: The points of the sweep's file that are not done.
        typed: The commands that ran it, each with the folder where it was typed.
    """

    path: Path
    text: str
    points: dict[str, Point | None]
    commands: dict[str, str | None]
    obsolete: set[str]
    missing: list[Missing]
    typed: list[tuple[str, str]]

    def left_out(self, name: str | None) -> str | None:
        """Returns the reason why a run of this name does not count; None if it counts."""
        if name not in self.points:
            return "because they lie in a sweep's folder but are not points of it"
        return "because the sweep no longer asks for them" if name in self.obsolete else None


def read_swept(path: Path) -> SweptFolder:
    """Reads a sweep's folder.

    Raises:
        UserError: If its ``sweep.json`` is damaged, or of another version.
    """
    folder = SweepFolder(path)
    folder.about = about = read_sweep_file(path / SWEEP_FILE)
    plan, records = folder.planned(), folder.records()
    points = plan | {name: record.point for name, record in records.items()}
    planned = [point for name in plan if (point := points[name]) is not None]
    # The last start plans only its own seeds, and a search plans no trials
    seeds = {point.seed for point in planned}
    seeds_of_points = {point.seed for point in planned if point.role == "point" and not _is_search(path)}
    obsolete = {
        name
        for name, record in records.items()
        if name not in plan and record.point.seed in (seeds_of_points if record.point.role == "point" else seeds)
    }
    attempts, running, name = folder.attempts(), is_running(path), about.get("name", path.name)
    missing = [
        missing_point(key, point, name, _status(folder, records.get(key), key, running))
        for key, point in points.items()
        if key not in obsolete and not any((run / FILE).exists() for run in attempts.get(key, []))
    ]
    typed = [(entry["command"], entry["folder"]) for entry in about.get("commands", [])]
    commands = {key: record.command for key, record in records.items()}
    return SweptFolder(path, about.get("text", ""), points, commands, obsolete, missing, typed)


def _is_search(path: Path) -> bool:
    return any((path / name).exists() for name in ("optuna.db", FRONT))


def is_running(path: Path) -> bool:
    """Whether another process holds the folder, a sweep or one of its fits."""
    try:
        import fcntl

        lock = os.open(path / "lock", os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.pread(lock, 32, 0).decode().strip() != str(os.getpid())
    finally:
        os.close(lock)
    return False


def _status(folder: SweepFolder, record: Record | None, name: str, running: bool) -> str:
    status = (record and record.status) or "not started"
    if status == "stopped" or (status == "running" and not running):  # a killed sweep leaves "running"
        return "stopped before it was done"
    if status == "done":
        return "done, but its run is gone"
    if status == "blocked":
        return "not run, because a fit that it needs failed"
    lines = folder.last_lines(name, 1) if status == "failed" else []
    return ": ".join([status, *(line.strip()[:REASON] for line in lines)])

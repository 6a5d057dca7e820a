"""What a sweep's folder says of its points: which of its runs count, and what is not done."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.report.material import Missing
from lte_lightning.results import FILE
from lte_lightning.sweep.folder import COPY, FRONT, SWEEP_FILE, SweepFolder, read_sweep_file
from lte_lightning.sweep.points import slug

# As `lte_lightning.sweep.points` names them
POINT = re.compile(r"(?P<words>.+)-s(?P<seed>\d+)-[0-9a-f]{8}")
REASON = 160  # characters of a log's line


@dataclass
class SweptFolder:
    """A sweep's folder, read.

    Args:
        path: The folder.
        text: What the sweep says of itself.
        points: What is remembered of each of its points, by name, in the order of the sweep's file.
        obsolete: Names of those that the sweep's file no longer asks for.
        missing: The points that are asked for and not done.
        typed: The commands that ran it, each with the folder where it was typed.
    """

    path: Path
    text: str
    points: dict[str, dict[str, Any]]
    obsolete: set[str]
    missing: list[Missing]
    typed: list[tuple[str, str]]

    def left_out(self, name: str | None) -> str | None:
        """Says why a run of this name does not count; None if it does."""
        if name not in self.points:
            return "for they lie in a sweep's folder and are none of its points"
        return "for the sweep no longer asks for them" if name in self.obsolete else None


def read_swept(path: Path) -> SweptFolder:
    """Reads a sweep's folder.

    Raises:
        UserError: If its ``sweep.json`` is damaged, or of another version.
    """
    about, folder = read_sweep_file(path / SWEEP_FILE), SweepFolder(path)
    points = folder.statuses()
    planned = about.get("planned", [])
    seeds = {name: _seed(name, points) for name in planned}
    # A sweep that was last started with other seeds plans nothing of the rest's, and a search none of its trials
    shared = {seed for seed in seeds.values() if seed is not None}
    own = {seeds[name] for name in planned if _role(name, points) == "point" and not _is_search(path)} & shared
    obsolete = {
        name
        for name in points
        if name not in seeds and _seed(name, points) in (own if _role(name, points) == "point" else shared)
    }
    attempts, running = folder.attempts(), is_running(path)
    variants = [*_variants(path / COPY), *(point.get("variant") for point in points.values())]
    missing = []
    for name in dict.fromkeys([*planned, *points]):
        done = any((run / FILE).exists() for run in attempts.get(name, []))
        if not done and name not in obsolete:
            status = _status(folder, name, running)
            missing.append(missing_point(name, points, about.get("name", path.name), status, variants))
    ordered = {name: points.get(name, {}) for name in dict.fromkeys([*planned, *points])}
    typed = [(known["command"], known["folder"]) for known in about.get("commands", [])]
    return SweptFolder(path, about.get("text", ""), ordered, obsolete, missing, typed)


def _is_search(path: Path) -> bool:
    return any((path / name).exists() for name in ("optuna.db", FRONT))


def is_running(path: Path) -> bool:
    """Says whether a sweep, or a fit of one, holds the folder; this process is none that could be waited for."""
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


def _status(folder: SweepFolder, name: str, running: bool) -> str:
    status = folder.status(name).get("status", "not started")
    if status == "stopped" or (status == "running" and not running):  # a sweep that is killed says nothing
        return "stopped before it was done"
    if status == "done":
        return "done, but its run is gone"
    if status == "blocked":
        return "not run, for a fit that it needs failed"
    lines = folder.last_lines(name, 1) if status == "failed" else []
    return ": ".join([status, *(line.strip()[:REASON] for line in lines)])


def missing_point(
    name: str, points: dict[str, dict[str, Any]], sweep: str, status: str, variants: Iterable[str | None]
) -> Missing:
    """Says of a point what is remembered of it, or what its name tells.

    Args:
        name: The point's.
        points: What is remembered of the sweep's points.
        sweep: The sweep's name.
        status: What became of the point.
        variants: Those that the sweep is known to have.
    """
    known, found = points.get(name, {}), POINT.fullmatch(name)
    values = [f"{key.split('.')[-1]} {value}" for key, value in known.get("parameters", {}).items()]
    method = known.get("variant") or (known.get("role") if known.get("role") != "point" else "fit")
    if known.get("role") is None:
        # Not started: all there is are the words of its name, which a sweep made from the variant and the parameters
        words, *pairs = re.split(r"-(?=[A-Za-z_][A-Za-z_0-9.]*=)", found["words"] if found else name)
        values = [pair.replace("=", " ", 1) for pair in pairs]
        same = (variant for variant in variants if variant and slug(variant) == words)
        method = next(same, words.replace("_", " ").strip())
    return Missing(sweep, str(method), ", ".join(values), _seed(name, points), status)


def _variants(file: Path) -> list[str]:
    """The variants that a sweep file names; none if it is not there or cannot be read."""
    try:
        return [str(name) for name in yaml.safe_load(file.read_text())["variants"]]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return []


def _seed(name: str, points: dict[str, dict[str, Any]]) -> int | None:
    known, found = points.get(name, {}).get("seed"), POINT.fullmatch(name)
    return known if known is not None else int(found["seed"]) if found else None


def _role(name: str, points: dict[str, dict[str, Any]]) -> str:
    found = POINT.fullmatch(name)
    named = found["words"] if found and found["words"] in ("start", "floor") else "point"
    return points.get(name, {}).get("role") or named

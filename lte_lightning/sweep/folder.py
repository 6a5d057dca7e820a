"""A sweep's folder, which holds its whole state in plain files.

``sweep.json`` describes the sweep, ``points/NAME.json`` has the outcome of each fit and ``points/NAME.log`` its output.
The runs of the fits lie beside them, as of any fit. A finished run alone counts; the rest is kept for people.
"""

import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.files import abridged, is_checkpoint, read_json, write_json
from lte_lightning.results import FILE
from lte_lightning.sweep.checksums import checksum, checksums, files_of
from lte_lightning.sweep.points import Point, Sweep, restore
from lte_lightning.sweep.record import Record

LAYOUT = 1  # of what earlier versions wrote, too: of a point they kept its name, not its configs and options
SWEEP_FILE = "sweep.json"
COPY = "sweep.yaml"  # of the sweep file
FRONT = "front.md"  # the best trials of a search
# A sweep that was killed before it wrote sweep.json may have left these
BEFORE = {"points", "lock", f"{SWEEP_FILE}.tmp"}
# A killed sweep's fits end themselves; a new one waits for them for so many seconds
PATIENCE = 60


class SweepFolder:
    """The folder of one sweep, ``<root of its runs>/<experiment>``.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.points = self.path / "points"
        # Used until sweep.json names another id. A path is no id: another machine may have the same one
        self.about: dict[str, Any] = {"id": uuid.uuid4().hex}
        self.lock: int | None = None

    @contextmanager
    def hold(self, sweep: Sweep, patience: float = PATIENCE, words: Sequence[str] = ()) -> Iterator[None]:
        """Holds the folder for this sweep: no other sweep can run in it while the context lasts.

        The fits inherit the lock, and fits on other machines lock their logs: while a fit of a killed sweep still runs,
        no second sweep starts the same fit.

        Args:
            sweep: The sweep, whose file is copied here.
            patience: Seconds to wait for fits of a killed sweep.
            words: The typed command, which is stored with the working directory.

        Raises:
            UserError: If the folder cannot be written, holds something else or another sweep, or one runs in it.
        """
        self.check(sweep)
        try:
            self.points.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write the sweep's folder {self.path}: {error}; choose another --folder") from error
        try:
            self._take(self.lock, patience)
            self.check(sweep)
            self._begin(sweep, words)
            yield
        finally:
            os.close(self.lock)
            self.lock = None

    def _take(self, lock: int, patience: float) -> None:
        try:
            import fcntl  # not where reports are read, for Windows has none
        except ImportError as error:
            raise UserError("lte sweep needs file locks as Linux and macOS have them; run it there") from error

        def is_free(descriptor: int) -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                raise UserError(f"{self.path} cannot be locked: {error}; choose a --folder elsewhere") from error
            return True

        deadline = time.monotonic() + patience
        while not is_free(lock):
            holder = os.pread(lock, 32, 0).decode().strip()
            if _is_alive(holder):
                raise UserError(
                    f"another sweep (process {holder}) runs in {self.path}; wait for it, or choose another --folder"
                )
            self._wait(deadline, f"fits of a sweep that was killed (process {holder}) still run in {self.path}")
        for log in sorted(self.points.glob("*.log")):
            with log.open("ab") as file:  # a shared file system locks what can be written
                while not is_free(file.fileno()):
                    self._wait(deadline, f"the fit {log.stem} of {self.path} still runs, perhaps on another machine")
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def _wait(self, deadline: float, reason: str) -> None:
        if time.monotonic() > deadline:
            raise UserError(f"{reason}; end it, or wait, and start the sweep again")
        time.sleep(0.2)

    def check(self, sweep: Sweep) -> None:
        """Reads the folder's description, and refuses a folder that is not this sweep's.

        Raises:
            UserError: If it holds something else, another sweep, or fits whose configurations were others.
        """
        file = self.path / SWEEP_FILE
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a sweep's folder; choose another --folder")
        if not file.exists():
            if self.path.exists() and any(entry.name not in BEFORE for entry in self.path.iterdir()):
                raise UserError(f"{self.path} holds something else than a sweep; choose another --folder")
            return
        # Earlier versions marked a search's trials with the folder's path, so the path stays such a folder's id
        self.about = {"id": str(self.path)} | read_sweep_file(file)
        name, origin = self.about.get("name"), Path(self.about.get("file") or sweep.path)
        # A sweep may move with its repository: it is another only where both files are there, and differ
        moved = not origin.exists() or checksum(origin) == checksum(sweep.path)
        if name != sweep.path.stem or not (moved or origin.samefile(sweep.path)):
            owner = origin if name == sweep.path.stem else repr(name)
            raise UserError(f"{self.path} belongs to the sweep {owner}, not to {sweep.path}; choose another --folder")
        old = self.about.get("configs", {})
        files = [(name, file) for name, file in files_of(sweep).items() if name in old]
        changed = [name for name, file in files if old[name] not in checksums(file)]
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed since the sweep in {self.path} began, so its points would not be "
                "comparable; put the file back, or choose another --folder"
            )

    def _begin(self, sweep: Sweep, words: Sequence[str]) -> None:
        configs = self.about.get("configs", {}) | {name: checksum(file) for name, file in files_of(sweep).items()}
        self.about |= {"layout": LAYOUT, "name": sweep.path.stem, "text": sweep.about, "configs": configs}
        self.about["file"] = str(sweep.path.absolute())
        command = {"command": shlex.join(words), "folder": os.getcwd()}
        commands = self.about.setdefault("commands", [])
        if words and command not in [{key: earlier.get(key) for key in command} for earlier in commands]:
            commands.append(command | {"began": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.save()
        staging = self.path / f"{COPY}.tmp"
        shutil.copyfile(sweep.path, staging)
        staging.replace(self.path / COPY)

    def save(self) -> None:
        """Writes ``sweep.json``."""
        write_json(self.path / SWEEP_FILE, self.about)

    # What became of the points

    def record(self, name: str) -> Record | None:
        """Returns a point's record; None if its file is damaged or missing."""
        return Record.of(_read(self.points / f"{name}.json"))

    def records(self) -> dict[str, Record]:
        """Returns the records of all points, by name."""
        records = {file.stem: self.record(file.stem) for file in sorted(self.points.glob("*.json"))}
        return {name: record for name, record in records.items() if record is not None}

    def remember(self, point: Point, **facts: Any) -> None:
        """Stores a point, and updates its record."""
        stored = self.record(point.name) or Record(point)
        write_json(self.points / f"{point.name}.json", replace(stored, point=point, **facts).content())

    def plan(self, points: Sequence[Point]) -> None:
        """Stores all points that the sweep asks for, whether or not they have begun."""
        self.about["plan"] = [asdict(point) for point in points]
        self.save()

    def planned(self) -> dict[str, Point | None]:
        """Returns the points that the sweep asked for last, by name; an earlier version knew their names alone."""
        planned, plan = (self.about.get(key) for key in ("planned", "plan"))
        words = [name for name in planned if isinstance(name, str)] if isinstance(planned, list) else []
        names: dict[str, Point | None] = dict.fromkeys(words)
        points = [restore(content) for content in plan] if isinstance(plan, list) else []
        return names | {point.name: point for point in points if point is not None}

    def log(self, name: str) -> Path:
        """Returns the log file of a point."""
        return self.points / f"{name}.log"

    def last_lines(self, name: str, count: int = 5) -> list[str]:
        """Returns the last lines of a point's log."""
        try:
            text = self.log(name).read_text(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def attempts(self) -> dict[str, list[Path]]:
        """Returns the run folders of all points by name, oldest first."""
        runs: dict[str, list[Path]] = {}
        for file in sorted(self.path.glob("*/run.json"), key=lambda file: file.stat().st_mtime_ns):
            about = _read(file)
            if about.get("name"):
                runs.setdefault(about["name"], []).append(file.parent)
        return runs

    def finished(self, name: str, attempts: dict[str, list[Path]] | None = None) -> Path | None:
        """Returns the run folder with a point's results, preferably with its model, too; None if there is none."""
        runs = (self.attempts() if attempts is None else attempts).get(name, [])
        runs = [run for run in runs if (run / FILE).exists()]  # written last, and whole
        return next((run for run in runs if (run / "model").is_dir()), next(iter(runs), None))


def resumable(run: Path) -> bool:
    """Says whether a run that was killed left a checkpoint and the configuration to go on with."""
    return is_checkpoint(run / "checkpoints" / "last.ckpt") and (run / "config.yaml").exists()


def read_sweep_file(file: Path) -> dict[str, Any]:
    """Returns the contents of a ``sweep.json``.

    Raises:
        UserError: If it is damaged, or of another version.
    """
    way_out = "put it back, or choose another folder"
    try:
        about = read_json(file, way_out)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; {way_out}") from error
    if (layout := about.get("layout")) != LAYOUT:
        raise UserError(
            f"{file} has layout {abridged(layout)}, this lte-lightning reads {LAYOUT}; use the version that wrote "
            "it, or choose another folder"
        )
    return about


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, UserError):
        return {}


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return True  # it has the lock, and is about to write its number
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

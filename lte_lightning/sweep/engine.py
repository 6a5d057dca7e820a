"""The sweep loop: start ready points, record outcomes, print progress."""

import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lte_lightning.bars import say
from lte_lightning.results import FILE, read_results
from lte_lightning.sweep.command import as_words, fit_command, resume_command, sweep_options
from lte_lightning.sweep.folder import SweepFolder, resumable
from lte_lightning.sweep.points import Point
from lte_lightning.sweep.progress import Watch
from lte_lightning.sweep.record import Record
from lte_lightning.sweep.search import Trials
from lte_lightning.sweep.tracking import Tracker

LOOK = 1.0  # seconds between two looks at what runs
SIGNALS = 128  # exit codes above it, and below 0, are those of signals


class Runner(Protocol):
    """Runs commands somewhere."""

    slots: int

    def start(self, name: str, words: list[str], log: Path) -> None:
        """Starts a command."""

    def wait(self, patience: float) -> tuple[str, int] | None:
        """Returns the name and the exit code of the next command that ends; None if none does within some seconds."""

    def stop(self) -> None:
        """Ends all commands."""


@dataclass
class Summary:
    """Outcomes of the points: names of those done, failed with their exit codes, and not run."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)


class Engine:
    """Runs the missing points of a sweep, each after the points that it needs.

    Args:
        folder: The sweep's folder, held.
        runner: Runs the fits.
        tracker: Tells MLflow; None for no MLflow.
        trials: Proposes further points; None without a search.
        say: Prints a line.
        watch: Shows the running fits; None for no display.
    """

    def __init__(
        self,
        folder: SweepFolder,
        runner: Runner,
        tracker: Tracker | None = None,
        trials: Trials | None = None,
        say: Callable[[str], None] = say,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.folder, self.runner, self.tracker, self.trials, self.say = folder, runner, tracker, trials, say
        self.summary = Summary()
        self.points: dict[str, Point] = {}
        self._pending: list[Point] = []
        self._running: dict[str, float] = {}
        self._runs: dict[str, Path] = {}

    def run(self, points: list[Point]) -> Summary:
        """Runs the missing points and trials, and returns the outcomes of all.

        A killed point resumes from its last checkpoint. A failed point does too, and starts afresh if it fails again. A
        failed point stops only the points that need it.
        """
        self._add(points)
        try:
            while True:
                while len(self._running) < self.runner.slots and self._start_next():
                    pass
                if not self._running:
                    break
                if ended := self.runner.wait(LOOK):
                    self._settle(*ended)
                if self.watch:
                    self.watch.update(self._ended(), self._waiting())
        except BaseException:
            self.say(f"Stopped: {len(self._running)} running points are ended, start the sweep again to go on.")
            self.runner.stop()
            for name in self._running:
                self.folder.remember(self.points[name], status="stopped", seconds=self._seconds(name))
            raise
        return self.summary

    def _add(self, points: list[Point]) -> None:
        attempts = self.folder.attempts()
        for point in points:
            if point.name in self.points:
                continue
            self.points[point.name] = point
            run = self.folder.finished(point.name, attempts)
            if run is None:
                self._pending.append(point)
            else:
                self._runs[point.name] = run
                self._finish(point, run)
        for point in list(self._pending):
            if point.start in self._runs and not (self._runs[point.start] / "model").is_dir():
                # Its results stay, but its weights are needed once more
                del self._runs[point.start]
                self.summary.done.remove(point.start)
                self._pending.insert(0, self.points[point.start])
                self.say(f"{point.start}: its model/ is not there any more, so it is run once more.")
        if done := [point for point in points if point.name in self._runs]:
            self.say(f"{len(done)} of {len(points)} points are done already.")

    def _needs(self, point: Point) -> list[str]:
        """Returns the fits that must be done before a point: its start, and the floor if a search judges by it."""
        by_floor = self.trials is not None and {*self.trials.search.objectives} & {"floor", "span_kept"}
        return [name for name in (point.start, point.floor if by_floor else None) if name]

    def _start_next(self) -> bool:
        # A point whose floor is done goes first: its results can name the floor
        waiting = sorted(self._pending, key=lambda point: point.floor is not None and point.floor not in self._runs)
        for point in waiting:
            needs = self._needs(point)
            lost = [name for name in needs if name in self.summary.failed or name in self.summary.blocked]
            if lost:
                self._pending.remove(point)
                self.summary.blocked.append(point.name)
                self.folder.remember(point, status="blocked")
                # A trial whose fits did not all run is not judged. The next start of the sweep resumes it
                self.say(f"{self._count()} {point.name}: not run, for {lost[0]} failed")
            elif all(name in self._runs for name in needs):
                self._pending.remove(point)
                self._start(point)
                return True
        # Optuna proposes better once it knows the results, so it is asked only when nothing waits
        if not self._pending and self.trials is not None and not self._shared_failed() and (new := self.trials.ask()):
            self._add(new)
            return True
        return False

    def _shared_failed(self) -> bool:
        needed = {name for point in self.points.values() for name in self._needs(point)}
        return any(self.points[name].role == "start" or name in needed for name in self.summary.failed)

    def _start(self, point: Point) -> None:
        words = self.words(point)
        record = self.folder.record(point.name)
        with self.folder.log(point.name).open("a") as log:
            log.write(f"$ lightning {shlex.join(words)}\n")
        self.folder.remember(
            point,
            status="running",
            command=record and record.command if "--ckpt_path" in words else f"lightning {shlex.join(words)}",
            resumed="--ckpt_path" in words,
            began=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        self._running[point.name] = time.monotonic()  # before the start: an interrupt may come at any moment
        self.runner.start(point.name, words, self.folder.log(point.name))
        if self.watch:
            self.watch.started(point)

    def words(self, point: Point) -> list[str]:
        """Returns the words of a point's command, which begins a fit or resumes the point's last one."""
        attempts = self.folder.attempts().get(point.name, [])
        runs = [run for run in attempts if not (run / FILE).exists()]  # results are never removed
        last_record = self.folder.record(point.name) or Record(point)
        # A fit that a signal ended, or whose machine was lost, may have a good checkpoint
        failed = last_record.status == "failed" and 0 < (1 if last_record.code is None else last_record.code) < SIGNALS
        if runs and resumable(runs[-1]) and not (failed and last_record.resumed):
            if self.tracker:
                self.tracker.adopt(runs[-1])
            return resume_command(runs[-1])
        for lost in runs:  # it has no checkpoint, or failed twice from the same one
            shutil.rmtree(lost, ignore_errors=True)
            if self.tracker:
                self.tracker.forget(lost.name)
        added = sweep_options(point, self.folder, self._runs) | (self.tracker.options() if self.tracker else {})
        return fit_command(point) + as_words(added)

    def _settle(self, name: str, code: int) -> None:
        point, seconds = self.points[name], self._seconds(name)
        del self._running[name]
        run = self.folder.finished(name)
        if self.watch:
            self.watch.ended(name, run is not None)
        # A start that runs again for its model has old results. Any other fit with results is done, however it ended
        if run is not None and (code == 0 or (run / "model").is_dir()):
            self._runs[name] = run
            self.folder.remember(point, seconds=seconds)
            self._finish(point, run)
            described = read_results(run).describe()
            self.say(f"{self._count()} {name}: {described} ({seconds:.0f} s); {self._fits_left()} left")
            if code:
                self.say(f"    It has its results, and ended with exit code {code} nevertheless. Its log ends with")
                self._say_last_lines(name)
            return
        self.summary.failed[name] = code
        self.folder.remember(point, status="failed", code=code, seconds=seconds)
        self.say(f"{self._count()} {name}: FAILED with exit code {code}; {self._fits_left()} left. Its log ends with")
        self._say_last_lines(name)
        self._tell_trials(point, None)

    def _say_last_lines(self, name: str) -> None:
        for line in self.folder.last_lines(name):
            self.say(f"    {line}")

    def _seconds(self, name: str) -> float:
        this_attempt, record = time.monotonic() - self._running[name], self.folder.record(name)
        return round(this_attempt + ((record and record.seconds) or 0.0), 1)

    def _finish(self, point: Point, run: Path) -> None:
        self.summary.done.append(point.name)
        stored = self.folder.record(point.name) or Record(point)
        updated = replace(stored, point=point, status="done", run=run.name)
        # First tell MLflow, then note it: a sweep that is killed in between tells MLflow again
        if self.tracker and stored.told != self.tracker.parent and self.tracker.point_done(point, run):
            updated = replace(updated, told=self.tracker.parent)
        if updated != stored:
            self.folder.remember(point, status=updated.status, run=updated.run, told=updated.told)
        self._tell_trials(point, run)

    def _tell_trials(self, point: Point, run: Path | None) -> None:
        if self.trials is not None and point.role == "point":
            for line in self.trials.tell(point.name, None if run is None else read_results(run)):
                self.say(line)

    def _count(self) -> str:
        return f"[{self._ended()}/{self._ended() + self._fits_left()}]"

    def _ended(self) -> int:
        return len(self.summary.done) + len(self.summary.failed) + len(self.summary.blocked)

    def _waiting(self) -> dict[str, int]:
        """Returns how many points wait, by role."""
        counts = Counter(point.role for point in self._pending)
        return {**counts, "point": counts["point"] + (self.trials.fits_left() if self.trials else 0)}

    def _fits_left(self) -> int:
        trials_left = self.trials.fits_left() if self.trials else 0
        return len(self._pending) + len(self._running) + trials_left

"""Progress of a sweep: on a terminal a line for each running fit, elsewhere a line per event."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lte_lightning.results import FILE, Place
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point

SEARCH = 2.0  # seconds after which the run folder of a fit that has just begun is looked for again


@dataclass
class Running:
    """A fit that runs.

    Args:
        point: Its point.
        began: When it was started, in seconds of the monotonic clock.
        task: Its line on a terminal.
        run: Its run folder, as soon as it is there.
        place: Where it stands, as far as is known.
        looked: When its run folder was looked for last.
    """

    point: Point
    began: float
    task: TaskID
    run: Path | None = None
    place: Place | None = None
    looked: float = 0.0


class Watch:
    """Shows the running fits with stage, epoch and time, and an estimate of the remaining time.

    Args:
        folder: The sweep's folder.
        slots: How many fits run at a time.
        say: Where to print a line, if the console is no terminal.
        console: The terminal; by default the one that the process has.
    """

    def __init__(
        self,
        folder: SweepFolder,
        slots: int,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        console: Console | None = None,
    ) -> None:
        console = console or Console()
        self.folder, self.slots, self.say = folder, slots, None if console.is_terminal else say
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[at]}"),
        )
        # Drawn when the engine looks: a thread of its own would be copied into every fit that is started
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False)
        self._all = self.bars.add_task("fits", total=None, at="")
        self._running: dict[str, Running] = {}
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for record in folder.records().values():
            if record.status == "done" and record.seconds:
                self._seconds[record.point.role].append(record.seconds)

    def __enter__(self) -> Self:
        if self.say is None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            self.bars.remove_task(running.task)
        if self.say is None:
            self.bars.stop()

    def started(self, point: Point) -> None:
        """Notes that a fit was started."""
        task = self.bars.add_task(point.name, total=None, at="is starting")
        self._running[point.name] = Running(point, time.monotonic(), task)
        if self.say:
            self.say(f"{point.name}: started")

    def ended(self, name: str, done: bool) -> None:
        """Notes that a fit ended, and whether it is done."""
        running = self._running.pop(name)
        self.bars.remove_task(running.task)
        if done:
            self._seconds[running.point.role].append(time.monotonic() - running.began)

    def look(self, ended: int, waiting: dict[str, int]) -> None:
        """Looks where the running fits stand, and shows it.

        Args:
            ended: How many points have ended.
            waiting: How many points wait, by role.
        """
        total = ended + sum(waiting.values()) + len(self._running)
        for name, running in self._running.items():
            before, place = running.place, self._place(running)
            if place is None or place == before:
                continue
            at = f"{place.stage} {place.epoch}/{place.epochs}"
            self.bars.update(running.task, total=place.total, completed=place.done, at=at)
            if self.say:
                seconds = time.monotonic() - running.began
                self.say(
                    f"{name}: {at}, epoch {place.done + 1} of {place.total} ({seconds:.0f} s); {self._left(waiting)}"
                )
        if self.say is None:
            self.bars.update(self._all, total=total, completed=ended, at=self._left(waiting))
            self.bars.refresh()

    def _place(self, running: Running) -> Place | None:
        now = time.monotonic()
        if running.run is None and now - running.looked >= SEARCH:
            running.looked = now
            attempts = self.folder.attempts().get(running.point.name, [])
            running.run = next((run for run in reversed(attempts) if not (run / FILE).exists()), None)
        if running.run is not None and (place := Place.read(running.run)):
            running.place = place
        return running.place

    def _left(self, waiting: dict[str, int]) -> str:
        """Returns an estimate of the remaining time, from the times of fits of the same role."""
        whole = {role: fmean(times) for role, times in self._seconds.items() if times}
        rest, unknown = 0.0, False
        for running in self._running.values():
            spent, place = time.monotonic() - running.began, running.place
            if running.point.role in whole:
                rest += max(0.0, whole[running.point.role] - spent)
            elif place and place.done:  # this one has come so far that it says how long such fits take
                whole[running.point.role] = spent * place.total / place.done
                rest += whole[running.point.role] - spent
            else:
                unknown = True
        for role, count in waiting.items():
            unknown |= count > 0 and role not in whole
            rest += count * whole.get(role, 0.0)
        seconds = rest / max(1, min(self.slots, len(self._running) + sum(waiting.values())))
        about = f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        return (
            f"more than {about.removeprefix('about ')}"
            if unknown and rest
            else "time left unknown"
            if unknown
            else about
        )

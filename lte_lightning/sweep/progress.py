"""Progress of a sweep: on a terminal a bar for each running fit, elsewhere a line per event."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Self, TextIO

from lte_lightning.bars import Bar, say
from lte_lightning.results import FILE, Place
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point

# A narrow screen cuts what comes last
LOOKS = "{desc:<12} {n_fmt:>3}/{total_fmt:<3} |{bar:20}| {elapsed}{postfix}"
SEARCH = 2.0  # seconds after which the run folder of a fit that has just begun is looked for again


@dataclass
class Running:
    """A fit that runs.

    Args:
        point: Its point.
        began: When it was started, in seconds of the monotonic clock.
        bar: Its bar on a terminal.
        run: Its run folder, as soon as it is there.
        place: Where it stands, as far as is known.
        looked: When its run folder was looked for last.
    """

    point: Point
    began: float
    bar: Bar
    run: Path | None = None
    place: Place | None = None
    looked: float = 0.0


class Watch:
    """Shows the running fits with stage, epoch and time, and an estimate of the remaining time.

    Args:
        folder: The sweep's folder.
        slots: How many fits run at a time.
        say: Prints a line, where no bars are shown.
        screen: Where to draw the bars; by default stderr, if it is a terminal.
    """

    def __init__(
        self,
        folder: SweepFolder,
        slots: int,
        say: Callable[[str], None] = say,
        screen: TextIO | None = None,
    ) -> None:
        self.folder, self.slots, self.say, self.screen = folder, slots, say, screen
        self._running: dict[str, Running] = {}
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for record in folder.records().values():
            if record.status == "done" and record.seconds:
                self._seconds[record.point.role].append(record.seconds)

    def __enter__(self) -> Self:
        self._all = self._bar("fits")
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (*(running.bar for running in self._running.values()), self._all):
            bar.close()

    def started(self, point: Point) -> None:
        """Notes that a fit was started."""
        bar = self._bar("is starting", point.name)
        self._running[point.name] = Running(point, time.monotonic(), bar)
        if self._all.disable:
            self.say(f"{point.name}: started")

    def ended(self, name: str, done: bool) -> None:
        """Notes that a fit ended, and whether it is done."""
        running = self._running.pop(name)
        running.bar.close()
        if done:
            self._seconds[running.point.role].append(time.monotonic() - running.began)

    def update(self, ended: int, waiting: dict[str, int]) -> None:
        """Looks where the running fits stand, and shows it.

        Args:
            ended: How many points have ended.
            waiting: How many points wait, by role.
        """
        total = ended + sum(waiting.values()) + len(self._running)
        for name, running in self._running.items():
            earlier, place = running.place, self._read_place(running)
            if place is not None and place != earlier:
                progress = f"{place.stage} {place.epoch}/{place.epochs}"
                running.bar.desc, running.bar.n, running.bar.total = progress, place.done, place.total
                if self._all.disable:
                    progress += f", epoch {place.done + 1} of {place.total} ({time.monotonic() - running.began:.0f} s)"
                    self.say(f"{name}: {progress}; {self._time_left(waiting)}")
            running.bar.refresh()
        self._all.n, self._all.total = ended, total
        self._all.set_postfix_str(self._time_left(waiting))

    def _bar(self, description: str, name: str = "") -> Bar:
        # The total of a fit is known once it has begun
        bar = Bar(desc=description, total=0, bar_format=LOOKS, file=self.screen)
        bar.set_postfix_str(name)
        return bar

    def _read_place(self, running: Running) -> Place | None:
        now = time.monotonic()
        if running.run is None and now - running.looked >= SEARCH:
            running.looked = now
            attempts = self.folder.attempts().get(running.point.name, [])
            running.run = next((run for run in reversed(attempts) if not (run / FILE).exists()), None)
        if running.run is not None and (place := Place.read(running.run)):
            running.place = place
        return running.place

    def _time_left(self, waiting: dict[str, int]) -> str:
        """Returns an estimate of the remaining time, from the times of fits of the same role."""
        time_of_role = {role: fmean(times) for role, times in self._seconds.items() if times}
        total, unknown = 0.0, False
        for running in self._running.values():
            spent, place = time.monotonic() - running.began, running.place
            if running.point.role in time_of_role:
                total += max(0.0, time_of_role[running.point.role] - spent)
            elif place and place.done:  # this one has come so far that it says how long such fits take
                time_of_role[running.point.role] = spent * place.total / place.done
                total += time_of_role[running.point.role] - spent
            else:
                unknown = True
        for role, count in waiting.items():
            unknown |= count > 0 and role not in time_of_role
            total += count * time_of_role.get(role, 0.0)
        seconds = total / max(1, min(self.slots, len(self._running) + sum(waiting.values())))
        about = f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        return (
            f"more than {about.removeprefix('about ')}"
            if unknown and total
            else "time left unknown"
            if unknown
            else about
        )

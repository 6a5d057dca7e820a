"""Finds a sweep's points among the fits of a folder: the same identity, under the folder's names."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lte_lightning.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import NEUTRAL, Point, Sweep, are_rivals, differences


class Remembered:
    """The fits that a sweep's folder remembers.

    Args:
        folder: The sweep's folder.
        sweep: The sweep file and the options as they are now; its points' names are as it gives them.
    """

    def __init__(self, folder: SweepFolder, sweep: Sweep) -> None:
        self.folder = folder
        attempts = folder.attempts()
        self._points = {name: record.point for name, record in folder.records().items()}
        self._finished = [name for name in self._points if folder.finished(name, attempts)]
        self._points |= _complete(self._points, sweep)
        begun = [name for name in self._points if name in attempts and name not in self._finished]
        self._names: dict[str, str] = {}
        for name in (*self._finished, *begun):
            if identity := self._points[name].identity:
                self._names.setdefault(identity, name)
        self._present = sweep.points()
        if sweep.search:
            self._present += sweep.trial(sweep.search.examples()[0])
        counts = Counter(point.identity for point in self._present)
        self._doubtful = {identity for identity, count in counts.items() if count > 1}

    def recognise(self, fits: list[Point]) -> list[Point]:
        """Returns the fits with the folder's names for them, and for their starts and floors."""
        names = {
            fit.name: fit.name
            if fit.name in self._finished or fit.identity in self._doubtful
            else self._names.get(fit.identity, fit.name)
            for fit in fits
        }
        return [
            replace(
                fit, name=names[fit.name], start=fit.start and names[fit.start], floor=fit.floor and names[fit.floor]
            )
            for fit in fits
        ]

    def _rivals(self, point: Point) -> list[Point]:
        return [other for other in self._present if are_rivals(point, other)]

    def check(self) -> None:
        """Refuses a folder whose finished fits are all of other options.

        Raises:
            UserError: If they are.
        """
        finished = [self._points[name] for name in self._finished]
        points = [point for point in finished if point.role == "point"] or finished
        pairs = [(point, rival) for point in points for rival in self._rivals(point)]
        if not pairs or any(point.identity and not differences(point, rival) for point, rival in pairs):
            return
        reason = f"{len(finished)} finished fits in {self.folder.path} belong to other options"
        reasons = [differences(point, rival) for point, rival in pairs if point.identity]
        if not reasons:
            commands = self.folder.about.get("commands") or [{"command": "lte sweep with the options that it had"}]
            raise UserError(
                f"{reason}: an earlier version kept their names alone, and none of them is a point of this sweep with "
                f"these options; go on with {commands[-1]['command']!r}, or choose another --folder"
            )
        nearest = min(reasons, key=len)
        raise UserError(f"{reason}: {'; '.join(nearest)[:500]}; use those, or choose another --folder")

    def matching(self, points: Sequence[Point]) -> tuple[list[Point], int]:
        """Returns the remembered fits that belong with a sweep's points, and how many do not.

        These are of its variants and options with other seeds or parameters, trials among them, or of variants that
        the file no longer names; and the starts and floors that they need.
        """
        present = {point.name for point in points}
        mine: dict[str, Point] = {}
        for name, point in self._points.items():
            rivals = self._rivals(point)
            alike = any(point.identity and not differences(point, rival) for rival in rivals)
            again = any(_is_again(point, rival) for rival in rivals)
            if name not in present and not again and (alike or (point.role == "point" and not rivals)):
                mine[name] = point
        needed = {need for point in mine.values() for need in point.needs} - mine.keys() - present
        mine |= {name: self._points[name] for name in needed & self._points.keys()}
        left_out = set(self._finished) - mine.keys() - present
        order = ("start", "floor", "point")
        return sorted(mine.values(), key=lambda point: (order.index(point.role), point.name)), len(left_out)


def _is_again(old: Point, new: Point) -> bool:
    """Says whether one fit repeats another with a new start or floor."""
    return bool(old.identity) and (old.options, old.seed) == (new.options, new.seed)


def _complete(points: dict[str, Point], sweep: Sweep) -> dict[str, Point]:
    """Completes points of an earlier version, which kept no options, by the options that give them their names.

    Nobody knows whether the sweep was begun with options that cannot change a value, so it is tried without them, too.
    """
    plain = {key: value for key, value in sweep.extra.items() if key not in NEUTRAL}
    completed: dict[str, Point] = {}
    for point in points.values():
        for extra in (plain, sweep.extra):
            if not point.identity:
                one_seed = replace(sweep, seeds=(point.seed,), extra=extra, recognise=None)
                with contextlib.suppress(UserError):  # parameters that its variant does not take any more
                    is_variant = point.role == "point" and point.variant in sweep.variants
                    fits = one_seed.fits(point.variant, point.parameters) if is_variant else one_seed.points()
                    completed |= {fit.name: fit for fit in fits if fit.name in points}
    return {name: fit for name, fit in completed.items() if not points[name].identity}


def recognise(sweep: Sweep, folder: SweepFolder) -> Sweep:
    """Returns the sweep with the folder's names for its points.

    Raises:
        UserError: If the folder is another sweep's, or all that is finished there is of other options.
    """
    folder.check(sweep)
    known = Remembered(folder, sweep)
    known.check()
    return replace(sweep, recognise=known.recognise)

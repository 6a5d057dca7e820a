"""Which of a folder's fits a sweep's points are, whatever their commands look like.

A point's name holds a digest of all that its command says. What a fit finds does not depend on all of it: a path may
end with a slash, progress may be shown or not, and a stage that is skipped may have any rate. So the fits that a folder
knows are recognised by what matters, and keep the names that they have there.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import NEUTRAL, Point, Sweep, read_options, text
from lte_lightning.sweep.spec import LATENCY


@dataclass(frozen=True)
class Identity:
    """What tells a fit from others; ``parameters`` names the options that its sweep varied."""

    role: str
    variant: str | None
    configs: tuple[str, ...]
    options: frozenset[tuple[str, str]]
    seed: int
    needs: tuple["Identity | None", "Identity | None"]
    parameters: frozenset[str] = field(compare=False)

    def differences(self, other: "Identity") -> list[str]:
        """Says in which options two fits of a variant differ, what was varied and the seeds apart."""
        varied = self.parameters | other.parameters
        mine, theirs = ({k: v for k, v in one.options if k not in varied} for one in (self, other))
        keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        found = [
            f"{k} {mine.get(k, 'unset')}, now {theirs.get(k, 'unset')}" for k in keys if mine.get(k) != theirs.get(k)
        ]
        return found if self.configs == other.configs else [f"configs {', '.join(self.configs)}", *found]

    def rivals(self, other: "Identity") -> bool:
        """Says whether both are fits of the same variant."""
        return (self.role, self.variant) == (other.role, other.variant)


class Known:
    """The fits that a sweep's folder knows.

    Args:
        folder: The sweep's folder.
        sweep: The sweep file and the options as they are now; its points' names are as it gives them.
    """

    def __init__(self, folder: SweepFolder, sweep: Sweep) -> None:
        self.folder = folder
        self._statuses = folder.statuses()
        self._identities: dict[str, Identity | None] = {}
        attempts = folder.attempts()
        self._finished = [name for name in self._statuses if folder.finished(name, attempts)]
        begun = [name for name in self._statuses if name in attempts and name not in self._finished]
        self._names: dict[Identity, str] = {}
        for name in (*self._finished, *begun):
            if (found := self._remembered(name)) is not None:
                self._names.setdefault(found, name)
        self._present = identities(sweep.points())
        if sweep.search:
            self._present |= identities([*sweep.points(), *sweep.trial(sweep.search.examples()[0])])
        counts = Counter(self._present.values())
        self._doubtful = {one for one, count in counts.items() if count > 1}

    def recognise(self, fits: list[Point]) -> list[Point]:
        """Returns fits under the names that the folder knows them by, with all that they need among them."""
        found = identities(fits)
        names = {
            name: name if name in self._finished or one in self._doubtful else self._names.get(one, name)
            for name, one in found.items()
        }
        return [
            replace(
                point,
                name=names[point.name],
                start=point.start and names[point.start],
                floor=point.floor and names[point.floor],
            )
            for point in fits
        ]

    def check(self) -> None:
        """Refuses a folder whose finished fits are all of other options.

        Raises:
            UserError: If they are.
        """
        finished = {name: one for name in self._finished if (one := self._remembered(name))}
        points = {name: one for name, one in finished.items() if one.role == "point"} or finished
        rivals = {n: [p for p in self._present.values() if p.rivals(one)] for n, one in points.items()}
        if not any(rivals.values()) or any(not points[n].differences(p) for n, some in rivals.items() for p in some):
            return
        name, some = next((name, some) for name, some in rivals.items() if some)
        nearest = min((points[name].differences(p) for p in some), key=len)
        raise UserError(
            f"{len(finished)} finished fits in {self.folder.path} belong to other options: {'; '.join(nearest)[:500]}; "
            "use those, or choose another --folder"
        )

    def others(self, points: Sequence[Point]) -> tuple[list[Point], int]:
        """Returns the remembered fits that belong with a sweep's points, and how many do not.

        These are of its variants and options with other seeds or parameters, trials among them, or of variants that
        the file no longer names; and the starts and floors that they need.
        """
        known = {point.name for point in points}
        mine: dict[str, Point] = {}
        for name in self._statuses.keys() - known:
            one = self._remembered(name)
            rivals = [p for p in self._present.values() if one is not None and p.rivals(one)]
            alike = any(not one.differences(p) for p in rivals)
            if any((p.options, p.seed) == (one.options, one.seed) for p in rivals):
                continue  # the same fit from another start or with another floor: there is a new one for it
            if one is not None and (alike or (one.role == "point" and not rivals)):
                mine[name] = self._point(name)
        needed = {need for point in mine.values() for need in point.needs} - mine.keys() - known
        mine |= {name: self._point(name) for name in needed if self._remembered(name) is not None}
        left_out = set(self._finished) - mine.keys() - known
        return sorted(mine.values(), key=lambda p: (("start", "floor", "point").index(p.role), p.name)), len(left_out)

    def _point(self, name: str) -> Point:
        keys = ("role", "variant", "parameters", "seed")
        status = self._statuses[name]
        return Point(name, *(status[key] for key in keys), (), {}, status.get("start"), status.get("floor"))

    def _remembered(self, name: str) -> Identity | None:
        """The identity of a fit by its command; None if nobody knows that."""
        if name in self._identities:
            return self._identities[name]
        self._identities[name] = found = None
        status = self._statuses.get(name, {})
        pairs = read_options(status.get("command"))
        if pairs and {"role", "variant", "parameters", "seed"} <= status.keys():
            configs = [value for key, value in pairs if key == "config"]
            needs = [self._remembered(status[key]) if status.get(key) else None for key in ("start", "floor")]
            lost = any(status.get(key) and need is None for key, need in zip(("start", "floor"), needs, strict=True))
            facts = (status["role"], status["variant"], status["parameters"], status["seed"])
            found = None if lost else _identity(*facts, configs, dict(pairs), *needs)
        self._identities[name] = found
        return found


def recognise(sweep: Sweep, folder: SweepFolder) -> Sweep:
    """Returns a sweep whose points have the names that a folder knows them by.

    Raises:
        UserError: If the folder is another sweep's, or all that is finished there is of other options.
    """
    folder.check(sweep)
    known = Known(folder, sweep)
    known.check()
    return replace(sweep, recognise=known.recognise)


def identities(points: Iterable[Point]) -> dict[str, Identity]:
    """Returns the identities of points by name; what a point needs stands before it."""
    found: dict[str, Identity] = {}
    for p in points:
        needs = (found[p.start] if p.start else None, found[p.floor] if p.floor else None)
        found[p.name] = _identity(p.role, p.variant, p.parameters, p.seed, p.configs, p.overrides, *needs)
    return found


def _identity(
    role: str,
    variant: str | None,
    parameters: Iterable[str],
    seed: int,
    configs: Iterable[str],
    options: dict[str, Any],
    start: Identity | None,
    floor: Identity | None,
) -> Identity:
    kept = {}
    for key, value in options.items():
        own = key in ("seed_everything", "config") or (key.startswith("run.") and key != LATENCY)
        if not own and key not in NEUTRAL and not (start and key == "model.init_from"):
            kept[key] = _plain(value)
    lengths = ("epochs", "steps")
    named = [key.rpartition(".") for key in kept if key.startswith("stages.")]
    skipped = {stage for stage, _, last in named if last in lengths and kept[f"{stage}.{last}"] == "0"}
    for stage, _, last in named:
        if stage in skipped and last not in lengths:
            del kept[f"{stage}.{last}"]
    # Their contents are compared by the folder, which knows them by longer names
    files = tuple(Path(path).name for path in configs)
    return Identity(role, variant, files, frozenset(kept.items()), seed, (start, floor), frozenset(parameters))


def _plain(value: Any) -> str:
    """Writes a value as any other spelling of it is written: 1e-4 and 0.0001, folder and folder/."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value.rstrip("/") or value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    return text(value)

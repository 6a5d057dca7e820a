"""The fits of a sweep: their content, their identity and their names."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError

# A start trains the plain model and nothing else; the points go on from its weights.
DENSE_ONLY = {"stages.router.epochs": 0, "stages.expert.epochs": 0}
FROM_START = {"stages.dense.epochs": 0}
FLOOR = {"model.lte.selector": "none", "stages.router.epochs": 0}
INIT = "model.init_from"
# Options that cannot change a result
NEUTRAL = (
    "trainer.logger",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.default_root_dir",
)
# For these options 1 is one batch and 1.0 is all batches
BY_SHARE = ("trainer.limit_", "trainer.overfit_batches", "trainer.val_check_interval")


@dataclass(frozen=True)
class Point:
    """One fit of a sweep. It is stored whole, so nothing is parsed from its name or command.

    Args:
        name: Unique in the sweep; names its files and its run.
        role: ``point``, or ``start`` and ``floor``, which the points share.
        variant: The variant that it belongs to, if the sweep has any.
        parameters: Options in which it differs from the variant's other points.
        seed: Its ``seed_everything``.
        configs: Its configuration files.
        overrides: All options that the sweep sets, the parameters among them.
        start: Name of the fit whose dense model it starts from.
        floor: Name of the fit whose floor is reported with it.
        identity: Digest of the fit (see `identify`); empty if an earlier version, which kept names without options,
            ran it.
    """

    name: str
    role: str
    variant: str | None
    parameters: dict[str, Any]
    seed: int
    configs: tuple[str, ...]
    overrides: dict[str, Any] = field(hash=False)
    start: str | None = None
    floor: str | None = None
    identity: str = ""

    @property
    def needs(self) -> list[str]:
        """The fits that belong to it: its start, which must be done before, and its floor, which is only reported."""
        return [name for name in (self.start, self.floor) if name]

    @property
    def files(self) -> list[str]:
        """The names of its configuration files."""
        return [Path(path).name for path in self.configs]

    @property
    def options(self) -> dict[str, str]:
        """Its options in canonical form. With a start, ``model.init_from`` is not one of them."""
        return {key: value for key, value in canonical(self.overrides).items() if not (self.start and key == INIT)}


def restore(content: Any) -> Point | None:
    """Returns a stored point, or None if this is none. Points of earlier versions have no configs and options."""
    if not isinstance(content, dict):
        return None
    names = {attribute.name for attribute in fields(Point)}
    stored = {"configs": (), "overrides": {}} | {key: value for key, value in content.items() if key in names}
    try:
        point = Point(**stored | {"configs": tuple(stored["configs"])})
    except TypeError:
        return None
    return point if _is_sound(point) else None


def _is_sound(point: Point) -> bool:
    """Says whether a point's values are of their types, and its names those of files in its sweep's folder."""
    names = [point.name, *(name for name in (point.start, point.floor) if name is not None)]
    return (
        all(isinstance(name, str) and name.isprintable() and Path(name).name == name for name in names)
        and point.role in ("point", "start", "floor")
        and isinstance(point.variant, str | None)
        and type(point.seed) is int
        and all(isinstance(values, dict) for values in (point.parameters, point.overrides))
        and all(isinstance(word, str) for word in (*point.parameters, *point.overrides, *point.configs, point.identity))
    )


@dataclass(frozen=True)
class Search:
    """The search of a sweep file; see `lte_lightning.sweep.search`."""

    trials: int
    parameters: dict[str, dict[str, Any]]
    objectives: dict[str, str]
    storage: str | None = None
    study: str | None = None
    seed: int = 0

    def examples(self) -> list[dict[str, Any]]:
        """Examples of trials' parameters, which contain every choice and both ends of every range."""
        ranges = {
            key: limits.get("choices") or [limits["low"], limits["high"]] for key, limits in self.parameters.items()
        }
        return [
            {key: values[i % len(values)] for key, values in ranges.items()}
            for i in range(max(map(len, ranges.values())))
        ]


@dataclass(frozen=True)
class Block:
    """The options of one variant."""

    configs: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    points: tuple[dict[str, Any], ...] = ({},)
    start: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read and checked."""

    path: Path
    about: str
    seeds: tuple[int, ...]
    variants: dict[str | None, Block]
    search: Search | None
    extra: dict[str, Any]
    recognise: Callable[[list[Point]], list[Point]] | None = None  # gives fits the names that a folder knows them by

    def points(self) -> list[Point]:
        """All fits in an order in which they can run. With a search these are only the fits that its trials share.

        Raises:
            UserError: If two of them are the same.
        """
        if self.search is None:
            fits = [
                p for name, block in self.variants.items() for point in block.points for p in self.fits(name, point)
            ]
        else:
            fits = [p for name in self.variants for p in self.fits(name, {}) if p.role != "point"]
        points: dict[str, Point] = {}
        for point in fits:
            if point.name in points and point.role == "point":
                raise UserError(f"{self.path}: two points are the same fit: {point.name}")
            points[point.name] = point
        order = {"start": 0, "floor": 1, "point": 2}
        return sorted(points.values(), key=lambda point: order[point.role])

    def trial(self, parameters: dict[str, Any]) -> list[Point]:
        """The points of one trial of a search, one for each seed."""
        (name,) = self.variants
        return [point for point in self.fits(name, parameters) if point.role == "point"]

    def fits(self, variant: str | None, parameters: dict[str, Any]) -> list[Point]:
        """The points of one setting, one for each seed, with the starts and floors that they share."""
        block, fits = self.variants[variant], []
        dense = [key for key in parameters if key.startswith("stages.dense.")]
        if dense and block.start is not None:
            raise UserError(
                f"{self.path}: {dense[0]} cannot differ between points that share one dense start; set it in the "
                "overrides of start, or write start: false"
            )
        for seed in self.seeds:
            shared = Point("", "start", None, {}, seed, block.configs, {})
            start = floor = None
            if block.start is not None:
                start = self._named(replace(shared, overrides=block.start | self.extra | DENSE_ONLY))
                fits.append(start)
            going_on = FROM_START if start else {}
            if block.floor is not None:
                overrides = block.floor | self.extra | FLOOR | going_on
                floor = self._named(replace(shared, role="floor", overrides=overrides), start)
                fits.append(floor)
            overrides = block.overrides | parameters | self.extra | going_on
            point = Point("", "point", variant, parameters, seed, block.configs, overrides)
            fits.append(self._named(point, start, floor))
        return self.recognise(fits) if self.recognise else fits

    def _named(self, point: Point, start: Point | None = None, floor: Point | None = None) -> Point:
        point = replace(point, start=start.name if start else None, floor=floor.name if floor else None)
        # Paths relative to the sweep file, so that a sweep keeps its names when its repository moves
        files = [os.path.relpath(path, self.path.parent) for path in point.configs]
        same = [files, sorted(point.overrides.items()), point.seed, point.role, point.variant, point.start, point.floor]
        digest = hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()[:8]
        values = [f"{key.split('.')[-1]}={text(value)}" for key, value in point.parameters.items()]
        words = [point.role if point.role != "point" else point.variant or "fit", *values]
        name = f"{slug('-'.join(words))[:80]}-s{point.seed}-{digest}"
        return replace(point, name=name, identity=identify(point, start))


def identify(point: Point, start: Point | None = None) -> str:
    """Returns the digest of a fit's options in canonical form, its configs, and its start.

    The floor does not count, because it is only reported beside the fit. Configs count by their names: a sweep may
    move, and its folder has their checksums.
    """
    facts: list[Any] = [point.role, point.variant, point.seed, point.files, sorted(point.options.items())]
    facts.append(start.identity if start else None)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def canonical(options: Mapping[str, Any]) -> dict[str, str]:
    """Returns a fit's options in canonical form, the same for every spelling of a fit.

    `X/` becomes `X`; the text "1" and the number 1.0 become 1. Options of a stage that is skipped are left out, and so
    are options that change only what a fit shows.
    """
    plain = {key: _plain(key, value) for key, value in options.items() if key not in NEUTRAL}
    stages = {key: key.rpartition(".") for key in plain if key.startswith("stages.")}
    lengths = ("epochs", "steps")
    skipped = {stage for key, (stage, _, last) in stages.items() if last in lengths and plain[key] == "0"}
    unused = {key for key, (stage, _, last) in stages.items() if stage in skipped and last not in lengths}
    return {key: value for key, value in plain.items() if key not in unused}


def _plain(key: str, value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value.rstrip("/") or value
    whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return text(int(value) if whole and not key.startswith(BY_SHARE) else value)


def differences(old: Point, new: Point) -> list[str]:
    """Returns the options in which two fits of a variant differ, varied parameters and seeds aside."""
    varied, mine, theirs = {*old.parameters, *new.parameters}, old.options, new.options
    keys = [key for key in sorted({*mine, *theirs} - varied) if mine.get(key) != theirs.get(key)]
    options = [f"{key} {mine.get(key, 'unset')}, now {theirs.get(key, 'unset')}" for key in keys]
    return options if old.files == new.files else [f"configs {', '.join(old.files)}", *options]


def are_rivals(point: Point, other: Point) -> bool:
    """Says whether both are fits of the same variant."""
    return (point.role, point.variant) == (other.role, other.variant)


def slug(words: str) -> str:
    """Returns words in the form that names of points, and so of files, have."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", words)


def text(value: Any) -> str:
    """Writes a value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)

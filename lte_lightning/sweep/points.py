"""The fits that a sweep consists of, and what each is called."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError

# A start trains the plain model and nothing else; the points go on from its weights.
DENSE_ONLY = {"stages.router.epochs": 0, "stages.expert.epochs": 0}
FROM_START = {"stages.dense.epochs": 0}
FLOOR = {"model.lte.selector": "none", "stages.router.epochs": 0}
# What cannot change a figure
NEUTRAL = (
    "trainer.logger",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.default_root_dir",
)


@dataclass(frozen=True)
class Point:
    """One fit of a sweep.

    Args:
        name: Unique in the sweep; names its files and its run.
        role: ``point``, or ``start`` and ``floor``, which the points share.
        variant: The variant that it belongs to, if the sweep has any.
        parameters: What tells it from the variant's other points.
        seed: Its ``seed_everything``.
        configs: Its configuration files.
        overrides: All options that the sweep sets, the parameters among them.
        start: Name of the fit whose dense model it starts from.
        floor: Name of the fit whose floor is reported with it.
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

    @property
    def needs(self) -> list[str]:
        """The fits that must be done before it."""
        return [name for name in (self.start, self.floor) if name]

    def arguments(self) -> list[str]:
        """The fit's command line, except for what other fits give it and where it leaves its run."""
        words = ["fit", *(word for path in self.configs for word in ("--config", path))]
        return words + options({"seed_everything": self.seed} | self.overrides)


@dataclass(frozen=True)
class Search:
    """What Optuna is asked to find; see `lte_lightning.sweep.search`."""

    trials: int
    parameters: dict[str, dict[str, Any]]
    objectives: dict[str, str]
    storage: str | None = None
    study: str | None = None
    seed: int = 0

    def examples(self) -> list[dict[str, Any]]:
        """Parameters as trials may have them: among them is every choice, and both ends of every range."""
        ranges = {key: given.get("choices") or [given["low"], given["high"]] for key, given in self.parameters.items()}
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
        """All fits in the order in which they can be run; with a search, only those that its trials share.

        Raises:
            UserError: If two of them are the same.
        """
        if self.search is None:
            found = [p for name, block in self.variants.items() for one in block.points for p in self._fits(name, one)]
        else:
            found = [p for name in self.variants for p in self._fits(name, {}) if p.role != "point"]
        points: dict[str, Point] = {}
        for point in found:
            if point.name in points and point.role == "point":
                raise UserError(f"{self.path}: two points are the same fit: {point.name}")
            points[point.name] = point
        order = {"start": 0, "floor": 1, "point": 2}
        return sorted(points.values(), key=lambda point: order[point.role])

    def trial(self, parameters: dict[str, Any]) -> list[Point]:
        """The points of one trial of a search, one for each seed."""
        (name,) = self.variants
        return [point for point in self._fits(name, parameters) if point.role == "point"]

    def _fits(self, variant: str | None, parameters: dict[str, Any]) -> list[Point]:
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
                floor = replace(shared, role="floor", start=start and start.name)
                floor = self._named(replace(floor, overrides=block.floor | self.extra | FLOOR | going_on))
                fits.append(floor)
            overrides = block.overrides | parameters | self.extra | going_on
            point = Point("", "point", variant, parameters, seed, block.configs, overrides)
            fits.append(self._named(replace(point, start=start and start.name, floor=floor and floor.name)))
        return self.recognise(fits) if self.recognise else fits

    def _named(self, point: Point) -> Point:
        # Files by the name that the sweep file gives them, so that a sweep may move with its repository
        files = [os.path.relpath(path, self.path.parent) for path in point.configs]
        same = [files, sorted(point.overrides.items()), point.seed, point.role, point.variant, point.start, point.floor]
        digest = hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()[:8]
        values = [f"{key.split('.')[-1]}={text(value)}" for key, value in point.parameters.items()]
        words = [point.role if point.role != "point" else point.variant or "fit", *values]
        return replace(point, name=f"{slug('-'.join(words))[:80]}-s{point.seed}-{digest}")


def slug(words: str) -> str:
    """Writes words as the name of a point has them, and so its files."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", words)


def options(values: dict[str, Any]) -> list[str]:
    """Writes options as a command line has them."""
    return [word for key, value in values.items() for word in (f"--{key}", text(value))]


def read_options(command: str | None) -> list[tuple[str, str]]:
    """Reads the options of a fit's command line, the two words before them apart; there may be several ``config``."""
    words = shlex.split(command or "")[2:]
    return [(key.removeprefix("--"), value) for key, value in zip(words[::2], words[1::2], strict=False)]


def text(value: Any) -> str:
    """Writes a value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)

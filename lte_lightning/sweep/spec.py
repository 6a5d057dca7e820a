"""A sweep file: which fits a sweep consists of.

``configs``, ``overrides``, ``grid`` and ``list`` make one block; each entry of ``variants`` is a block of the same keys
that is laid over it. Every variant is crossed with every combination of the grids and lists, and with the seeds.
"""

import difflib
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.core.errors import UserError

BLOCK = {"configs", "overrides", "grid", "list", "start", "floor"}
SWEEP = BLOCK | {"about", "seeds", "variants", "search"}
SEARCH = {"trials", "parameters", "objectives", "storage", "study", "seed"}
# A start trains the plain model and nothing else; the points go on from its weights.
DENSE_ONLY = {"stages.router.epochs": 0, "stages.expert.epochs": 0}
FROM_START = {"stages.dense.epochs": 0}
FLOOR = {"model.lte.selector": "none", "stages.router.epochs": 0}
OWN = ("run.", "config", "seed_everything", "ckpt_path")  # what the sweep decides itself
LATENCY = "run.latency_rows"  # but for this


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


@dataclass(frozen=True)
class _Block:
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
    variants: dict[str | None, _Block]
    search: Search | None
    extra: dict[str, Any]

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
        return fits

    def _named(self, point: Point) -> Point:
        # Files by the name that the sweep file gives them, so that a sweep may move with its repository
        files = [os.path.relpath(path, self.path.parent) for path in point.configs]
        same = [files, sorted(point.overrides.items()), point.seed, point.role, point.variant, point.start, point.floor]
        digest = hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()[:8]
        values = [f"{key.split('.')[-1]}={_text(value)}" for key, value in point.parameters.items()]
        words = [point.role if point.role != "point" else point.variant or "fit", *values]
        slug = re.sub(r"[^A-Za-z0-9_.=-]+", "_", "-".join(words))[:80]
        return replace(point, name=f"{slug}-s{point.seed}-{digest}")


def read_sweep(path: str | Path, extra: dict[str, Any] | None = None, seeds: list[int] | None = None) -> Sweep:
    """Reads a sweep file.

    Args:
        path: The file; the configurations that it names are relative to it.
        extra: Options that override the file's, of every fit.
        seeds: Instead of the file's.

    Raises:
        UserError: If the file is missing, or says something that no sweep has.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the sweep file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(content, SWEEP, path, "the sweep")
    _check_options(extra or {}, path, "the command line")
    base = _block(content, _Block(), path, "the sweep")
    variants: dict[str | None, _Block] = {None: base}
    if "variants" in content:
        entries = _mapping(content["variants"], path, "variants")
        if not entries:
            raise UserError(f"{path}: variants is empty; name one, or leave the key out")
        variants = {}
        for name, entry in entries.items():
            _check_keys(entry or {}, BLOCK, path, f"variant {name!r}")
            variants[str(name)] = _block(entry or {}, base, path, f"variant {name!r}")
    if not all(block.configs for block in variants.values()):
        raise UserError(f"{path} names no configs: give the configuration files that its fits are based on")
    search = _search(content["search"], path) if "search" in content else None
    if search and (len(variants) > 1 or any(block.points != ({},) for block in variants.values())):
        raise UserError(f"{path}: a search proposes its points itself; leave out grid and list, and name one variant")
    measured = LATENCY in (extra or {}) or any(LATENCY in block.overrides for block in variants.values())
    if search and "speedup" in search.objectives and not measured:
        raise UserError(f"{path}: objective speedup needs {LATENCY} in overrides: how many rows it is measured on")
    found = seeds if seeds is not None else content.get("seeds", [0])
    if not isinstance(found, list) or not found or not all(type(s) is int and s >= 0 for s in found):
        raise UserError(f"{path}: seeds is {found!r}; give a list of whole numbers, such as [0, 1, 2]")
    return Sweep(path, str(content.get("about", "")), tuple(dict.fromkeys(found)), variants, search, extra or {})


def options(values: dict[str, Any]) -> list[str]:
    """Writes options as a command line has them."""
    return [word for key, value in values.items() for word in (f"--{key}", _text(value))]


def _block(entry: dict[str, Any], base: _Block, path: Path, where: str) -> _Block:
    configs = entry.get("configs") or []
    if not isinstance(configs, list):
        raise UserError(f"{path}: configs of {where} is {configs!r}; give a list of files")
    files = [os.path.normpath(path.parent / str(name)) for name in configs]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{path}: {where} names {file}, which is not there; paths are relative to the sweep file")
    overrides = _mapping(entry.get("overrides") or {}, path, f"overrides of {where}")
    _check_options(overrides, path, f"overrides of {where}")
    points = [a | b for a, b in itertools.product(base.points, _points(entry, path, where))]
    shared = {}
    # What shared fits get are the options for all fits, and their own; a variant's options are its method
    common = base.overrides if where != "the sweep" else overrides
    for key in ("start", "floor"):
        shared[key] = getattr(base, key)
        if key in entry:
            shared[key] = None
            if entry[key] is not False:
                own = {} if entry[key] in (None, True) else entry[key]
                _check_keys(own, {"overrides"}, path, f"{key} of {where}")
                mine = _mapping(own.get("overrides") or {}, path, f"overrides of {key} of {where}")
                _check_options(mine, path, f"overrides of {key} of {where}")
                shared[key] = common | mine
    return _Block(base.configs + tuple(files), base.overrides | overrides, tuple(points), **shared)


def _points(entry: dict[str, Any], path: Path, where: str) -> list[dict[str, Any]]:
    grid, entries = [{}], [{}]
    if "grid" in entry:
        axes = _mapping(entry["grid"], path, f"grid of {where}")
        _check_options(axes, path, f"grid of {where}")
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{path}: {key} in the grid of {where} is {values!r}; give a list of values")
        if not axes:
            raise UserError(f"{path}: the grid of {where} is empty; name a parameter, or leave the key out")
        grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if "list" in entry:
        entries = entry["list"]
        if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) and one for one in entries):
            raise UserError(f"{path}: the list of {where} is {entries!r}; give points, each a mapping of options")
        for one in entries:
            _check_options(one, path, f"list of {where}")
    return [a | b for a, b in itertools.product(grid, entries)]


def _search(entry: Any, path: Path) -> Search:
    entry = _mapping(entry, path, "search")
    _check_keys(entry, SEARCH, path, "search")
    trials, parameters = entry.get("trials"), _mapping(entry.get("parameters") or {}, path, "parameters of search")
    objectives = _mapping(entry.get("objectives") or {}, path, "objectives of search")
    if type(trials) is not int or trials < 1:
        raise UserError(f"{path}: trials of search is {trials!r}; give a whole number of at least 1")
    if not parameters:
        raise UserError(f"{path}: search has no parameters; give one low and high, or choices")
    _check_options(parameters, path, "parameters of search")
    for key, bounds in parameters.items():
        given = set(_mapping(bounds, path, f"{key} of search"))
        numbers = given >= {"low", "high"} and all(isinstance(bounds[k], int | float) for k in ("low", "high"))
        choices = given == {"choices"} and isinstance(bounds["choices"], list) and bounds["choices"]
        if not choices and not (
            numbers and given <= {"low", "high", "log", "step"} and bounds["low"] <= bounds["high"]
        ):
            raise UserError(f"{path}: {key} of search is {bounds!r}; give low and high (log, step), or choices")
    for key, direction in objectives.items():
        if direction not in ("maximize", "minimize"):
            raise UserError(f"{path}: objective {key} is {direction!r}; there are maximize and minimize")
    if not objectives:
        raise UserError(f"{path}: search has no objectives; give some, such as hard: maximize, sparsity: maximize")
    return Search(**entry)


def _check_options(values: dict[str, Any], path: Path, where: str) -> None:
    for key in values:
        if str(key).startswith(OWN) and key != LATENCY:
            hint = "give seeds" if key == "seed_everything" else "the sweep sets it itself"
            raise UserError(f"{path}: {where} sets {key}; {hint}")


def _mapping(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is {value!r}; it must be a mapping")
    return {str(key): item for key, item in value.items()}


def _check_keys(value: Any, known: set[str], path: Path, where: str) -> None:
    for key in _mapping(value, path, where):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(known))}"
            raise UserError(f"{path}: {where} has no key {key!r}; {meant}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

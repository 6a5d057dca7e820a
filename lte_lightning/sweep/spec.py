"""Reads a sweep file: which fits a sweep consists of.

``configs``, ``overrides``, ``grid`` and ``list`` make one block; each entry of ``variants`` is a block of the same keys
that is laid over it. Every variant is crossed with every combination of the grids and lists, and with the seeds.
"""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.documents import LimitError, read_yaml
from lte_lightning.errors import UserError, meant, meant_path
from lte_lightning.results import MEASURED, OBJECTIVES
from lte_lightning.sweep.points import Block, Search, Sweep

BLOCK = {"configs", "overrides", "grid", "list", "start", "floor"}
SWEEP = BLOCK | {"about", "seeds", "variants", "search"}
SEARCH = {"trials", "parameters", "objectives", "storage", "study", "seed"}
OWN = ("run.", "config", "seed_everything", "ckpt_path")  # what the sweep decides itself
LATENCY = "run.latency_rows"  # but for this


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
        content = read_yaml(path.read_text("utf-8-sig"))
    except OSError as error:
        near = meant_path(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the sweep file {path}: {error.strerror}{near}") from error
    except LimitError as error:
        raise UserError(
            f"{path} cannot be read: something in it contains itself, or is too deep or too large: {error}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # a text in Latin-1, a month 13
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(content, SWEEP, path, "the sweep")
    _check_options(extra or {}, path, "the command line")
    base = _block(content, Block(), path, "the sweep")
    variants: dict[str | None, Block] = {None: base}
    if "variants" in content:
        entries = _mapping(content["variants"], path, "variants")
        if not entries:
            raise UserError(f"{path}: variants is empty; name one, or leave the key out")
        variants = {}
        for name, entry in entries.items():
            options = {} if entry is None else entry
            _check_keys(options, BLOCK, path, f"variant {name!r}")
            variants[str(name)] = _block(options, base, path, f"variant {name!r}")
    if not all(block.configs for block in variants.values()):
        raise UserError(f"{path} names no configs: give the configuration files that its fits are based on")
    search = _search(content["search"], path) if "search" in content else None
    if search and (len(variants) > 1 or any(block.points != ({},) for block in variants.values())):
        raise UserError(f"{path}: a search proposes its points itself; leave out grid and list, and name one variant")
    _check_extra(extra or {}, variants, search, path)
    measured = LATENCY in (extra or {}) or any(LATENCY in block.overrides for block in variants.values())
    if search and not measured and (timed := [key for key in search.objectives if key in MEASURED]):
        raise UserError(f"{path}: objective {timed[0]} needs {LATENCY} in overrides: how many rows it is measured on")
    seed_list = seeds if seeds is not None else content.get("seeds", [0])
    if (
        not isinstance(seed_list, list)
        or not seed_list
        or not all(type(seed) is int and seed >= 0 for seed in seed_list)
    ):
        raise UserError(f"{path}: seeds is {seed_list!r}; give a list of whole numbers, such as [0, 1, 2]")
    return Sweep(path, str(content.get("about", "")), tuple(dict.fromkeys(seed_list)), variants, search, extra or {})


def _block(entry: dict[str, Any], base: Block, path: Path, where: str) -> Block:
    configs = [] if entry.get("configs") is None else entry["configs"]
    if not isinstance(configs, list):
        raise UserError(f"{path}: configs of {where} is {configs!r}; give a list of files")
    files = [os.path.normpath(path.parent / str(name)) for name in configs]
    for file in files:
        if not Path(file).is_file():
            raise UserError(
                f"{path}: {where} names {file}, which is not there; paths are relative to the sweep file"
                f"{meant_path(file)}"
            )
    overrides = _mapping(entry.get("overrides"), path, f"overrides of {where}")
    _check_options(overrides, path, f"overrides of {where}")
    points = [outer | inner for outer, inner in itertools.product(base.points, _points(entry, path, where))]
    shared = {}
    # What shared fits get are the options for all fits, and their own; a variant's options are its method
    common = base.overrides if where != "the sweep" else overrides
    for key in ("start", "floor"):
        shared[key] = getattr(base, key)
        if key in entry:
            shared[key] = None
            if entry[key] is not False:
                content = {} if entry[key] is None or entry[key] is True else entry[key]
                _check_keys(content, {"overrides"}, path, f"{key} of {where}")
                mine = _mapping(content.get("overrides"), path, f"overrides of {key} of {where}")
                _check_options(mine, path, f"overrides of {key} of {where}")
                shared[key] = common | mine
    return Block(base.configs + tuple(files), base.overrides | overrides, tuple(points), **shared)


def _points(entry: dict[str, Any], path: Path, where: str) -> list[dict[str, Any]]:
    grid: list[dict[str, Any]] = [{}]
    entries: list[dict[str, Any]] = [{}]
    if "grid" in entry:
        axes = _mapping(entry["grid"], path, f"grid of {where}")
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{path}: {key} in the grid of {where} is {values!r}; give a list of values")
            for value in values:
                _check_options({key: value}, path, f"grid of {where}")
        if not axes:
            raise UserError(f"{path}: the grid of {where} is empty; name a parameter, or leave the key out")
        grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if "list" in entry:
        entries = entry["list"]
        if (
            not isinstance(entries, list)
            or not entries
            or not all(isinstance(point, dict) and point for point in entries)
        ):
            raise UserError(f"{path}: the list of {where} is {entries!r}; give points, each a mapping of options")
        entries = [_mapping(point, path, f"list of {where}") for point in entries]
        for point in entries:
            _check_options(point, path, f"list of {where}")
    return [cell | chosen for cell, chosen in itertools.product(grid, entries)]


def _search(entry: Any, path: Path) -> Search:
    _check_keys(entry, SEARCH, path, "search")
    entry = _mapping(entry, path, "search")
    trials, parameters = entry.get("trials"), _mapping(entry.get("parameters"), path, "parameters of search")
    objectives = _mapping(entry.get("objectives"), path, "objectives of search")
    if type(trials) is not int or trials < 1:
        raise UserError(f"{path}: trials of search is {trials!r}; give a whole number of at least 1")
    if not parameters:
        raise UserError(f"{path}: search has no parameters; give one low and high, or choices")
    for key, limits in parameters.items():
        _check_options({key: None}, path, "parameters of search")
        if wrong := _wrong_range(_mapping(limits, path, f"{key} of search")):
            raise UserError(f"{path}: {key} of search is {limits!r}; {wrong}")
    for key, direction in objectives.items():
        if direction not in ("maximize", "minimize"):
            raise UserError(f"{path}: objective {key} is {direction!r}; there are maximize and minimize")
        if key not in OBJECTIVES + MEASURED:
            raise UserError(f"{path}: objective {key} is no figure of a fit; {_nearest(key, {*OBJECTIVES, *MEASURED})}")
    if not objectives:
        raise UserError(f"{path}: search has no objectives; give some, such as hard: maximize, sparsity: maximize")
    seed = entry.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise UserError(f"{path}: seed of search is {seed!r}; give a whole number")
    for key in ("storage", "study"):
        if entry.get(key) is not None and not (isinstance(entry[key], str) and entry[key]):
            raise UserError(f"{path}: {key} of search is {entry[key]!r}; give a text")
    return Search(**entry | {"parameters": parameters, "objectives": objectives})


def _wrong_range(limits: dict[str, Any]) -> str | None:
    """Returns the error of a parameter's range, None if Optuna can draw from it."""
    if limits.keys() == {"choices"}:
        choices = limits["choices"]
        plain = isinstance(choices, list) and all(isinstance(each, str | int | float | None) for each in choices)
        return None if choices and plain else "give choices as a list of numbers and words"
    numbers = {key: limits[key] for key in ("low", "high", "step") if key in limits}
    if not {"low", "high"} <= limits.keys() <= {"low", "high", "log", "step"}:
        return "give low and high (log, step), or choices"
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values()):
        return "low, high and step are numbers"
    if limits["low"] > limits["high"]:
        return "low is above high"
    if not isinstance(limits.get("log", False), bool):
        return "log is true or false"
    if limits.get("log") and limits["low"] <= 0:
        return "with log low must be above 0"
    if limits.get("log") and "step" in limits:
        return "give log or step, not both"
    if limits.get("step", 1) <= 0:
        return "step must be above 0"
    return None


def _check_extra(extra: dict[str, Any], variants: dict[Any, Block], search: Search | None, path: Path) -> None:
    """Refuses options of every fit in which fits differ: the names of points would be wrong."""
    varied: dict[str, str] = {}
    for part in ("overrides", "start", "floor"):
        several = [options for block in variants.values() if (options := getattr(block, part)) is not None]
        for key in {key for options in several for key in options}:
            if len({repr(options.get(key)) for options in several}) > 1:
                varied[key] = f"its {'variants' if part == 'overrides' else f'{part}s'} differ in it"
    for block in variants.values():
        varied |= {key: "its grid or list varies it" for point in block.points for key in point}
    varied |= dict.fromkeys(search.parameters if search else (), "its search varies it")
    for key in extra:
        for varied_key, why in varied.items():
            if f"{key}.".startswith(f"{varied_key}.") or f"{varied_key}.".startswith(f"{key}."):
                raise UserError(
                    f"--{key} cannot be given for all fits of {path}: {why}, and points are called by it; change the "
                    "sweep file, or choose points by --only"
                )


def _check_options(values: dict[str, Any], path: Path, where: str) -> None:
    for key, value in values.items():
        for name in _names(key, value):
            if name.startswith(OWN) and name != LATENCY:
                hint = "give seeds" if name == "seed_everything" else "the sweep sets it itself"
                raise UserError(f"{path}: {where} sets {name}; {hint}")
        if "." not in key and not isinstance(value, dict):
            raise UserError(f"{path}: {where} sets {key!r}; options of a fit have a dot in them, as data.task has")
        if not _is_plain(value):
            raise UserError(
                f"{path}: {where} sets {key} to {value!r}, a {type(value).__name__}; put it in quotes if it is a text"
            )


def _names(key: str, value: Any) -> list[str]:
    """Returns an option's name, or the names of the options in a mapping."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [name for inner, item in value.items() for name in _names(f"{key}.{inner}", item)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


def _mapping(value: Any, path: Path, where: str) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is {value!r}; it must be a mapping")
    return {str(key): item for key, item in value.items()}


def _check_keys(value: Any, known: set[str], path: Path, where: str) -> None:
    if value is None:
        raise UserError(f"{path}: {where} is None; it must be a mapping")
    for key in _mapping(value, path, where):
        if key not in known:
            raise UserError(f"{path}: {where} has no key {key!r}; {_nearest(key, known)}")


def _nearest(name: str, known: set[str]) -> str:
    return meant(name, known, "did you mean {}?") or f"known are {', '.join(sorted(known))}"

"""Reads what a report is made of: runs, the sweeps that they belong to, and benchmarks."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.core.errors import UserError
from lte_lightning.report.bench import read_bench
from lte_lightning.sweep.folder import SWEEP_FILE, SweepFolder, read_sweep_file
from lte_lightning.sweep.table import better, read_results, read_run_file

SELECTORS = {"router": "LTE", "none": "floor", "kla": "KLA (oracle)", "dejavu": "Deja Vu"}
# What tells runs apart without being a choice of theirs
NO_PARAMETER = ("run.", "seed_everything", "ckpt_path", "model.init_args.init_from", "trainer.logger")


@dataclass
class Run:
    """One finished fit.

    Args:
        folder: Its run folder.
        method: The sweep's variant, or the name of the selector.
        role: ``point``, or what points shared: ``start`` (dense fine-tuning) or ``floor``.
        parameters: What tells it from the method's other runs, seeds apart.
        results: Its ``results.json``.
        histogram: How many scores of each layer fell in each bin of [0, 1]; empty if there were none.
        command: The command that ran it.
        options: Its configuration, flat; empty in a sweep.
        lte: The ``lte`` part of its model's configuration, empty for a dense model.
    """

    folder: Path
    method: str
    role: str
    parameters: dict[str, Any]
    results: dict[str, Any]
    histogram: list[list[int]]
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    lte: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the FFN neurons that do not run; 0 where nothing was selected."""
        return self.results["sparsity"] or 0.0


@dataclass
class Setting:
    """The runs of one method with the same parameters, one per seed."""

    task: str
    metric: str
    method: str
    parameters: dict[str, Any]
    runs: list[Run]

    def values(self, key: str | Callable[[Run], float | None]) -> list[float]:
        """Returns a figure of every run that has it."""
        found = [key(run) if callable(key) else run.results.get(key) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, key: str | Callable[[Run], float | None]) -> float | None:
        """Returns the mean over the seeds, None if no run has the figure."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    @property
    def sparsity(self) -> float:
        """Mean sparsity over the seeds."""
        return statistics.fmean(run.sparsity for run in self.runs)

    @property
    def label(self) -> str:
        """The parameters in a few words."""
        return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.parameters.items()) or "–"


@dataclass
class Material:
    """All that a report is made of."""

    runs: list[Run] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    about: list[str] = field(default_factory=list)

    def settings(self, task: str | None = None) -> list[Setting]:
        """Returns the points by method and parameters, each method's in the order of sparsity."""
        found: dict[tuple[str, ...], Setting] = {}
        for run in self.runs:
            if run.role == "point" and task in (None, run.results["task"]):
                names = run.results["task"], run.results["metric"], run.method
                key = (*names, json.dumps(run.parameters, sort_keys=True, default=str))
                found.setdefault(key, Setting(*names, run.parameters, [])).runs.append(run)
        methods = list(dict.fromkeys(setting.method for setting in found.values()))
        return sorted(found.values(), key=lambda s: (s.task, methods.index(s.method), s.sparsity))

    @property
    def tasks(self) -> dict[str, str]:
        """The tasks, each with its metric."""
        return {run.results["task"]: run.results["metric"] for run in self.runs}

    def reference(self, task: str, key: str) -> list[float]:
        """Returns the dense figure, or the floor, of a task for each seed, the best of several starts."""
        found: dict[int, float] = {}
        for row in (run.results for run in self.runs if run.results["task"] == task):
            value, known = row.get(key), found.get(row["seed"])
            if value is not None and (known is None or better(row["metric"], value, known)):
                found[row["seed"]] = value
        return list(found.values())


def collect(sources: Iterable[str | Path], bench: Iterable[str | Path] = ()) -> Material:
    """Reads sweep folders, run folders, folders of runs, and CSV files of ``lte bench``.

    Raises:
        UserError: If a source is none of them, holds no finished run, or was written by another version.
    """
    material, seen = Material(), set()
    for source in sources:
        path = Path(source).absolute()
        if not path.is_dir():
            raise UserError(f"there is no folder {source}; give a sweep's folder, or folders of runs")
        about: dict[str, dict[str, Any]] = {}
        if (path / SWEEP_FILE).exists():
            about = _sweep(path, material)
        files = [path / "results.json"] if (path / "results.json").exists() else sorted(path.rglob("results.json"))
        runs = [file.parent for file in files if (file.parent / "run.json").exists()]
        if not runs:
            raise UserError(f"{source} holds no finished run (a folder with run.json and results.json)")
        # as the sweep's file has them: run folders are named at random
        order = {name: i for i, name in enumerate(about)}
        runs.sort(key=lambda run: order.get(read_run_file(run).get("name") or "", len(order)))
        material.runs += [_run(run, about) for run in runs if run not in seen]
        seen |= set(runs)
    _tell_apart([run for run in material.runs if run.role == "point" and run.options])
    for file in bench:
        material.bench += read_bench(Path(file))
    return material


def _sweep(path: Path, material: Material) -> dict[str, dict[str, Any]]:
    """Returns what a sweep's folder remembers of its points, by name; notes which of them are not done."""
    sweep, folder = read_sweep_file(path / SWEEP_FILE), SweepFolder(path)
    if sweep.get("text"):
        material.about.append(sweep["text"])
    names = list(
        dict.fromkeys([*sweep.get("planned", []), *sorted(file.stem for file in folder.points.glob("*.json"))])
    )
    attempts = folder.attempts()
    for name in names:
        if folder.finished(name, attempts) is None:
            material.missing.append((name, folder.status(name).get("status", "not started")))
    return {name: folder.status(name) for name in names}


def _run(folder: Path, points: dict[str, dict[str, Any]]) -> Run:
    about = read_run_file(folder)
    results = read_results(folder)
    model = _json(folder / "model" / "lte_config.json")
    measured = model.get("about", {}).get("measured", {})
    views = measured.get("hard") or measured.get("hard_before") or {}
    selector = model.get("lte", {}).get("selector", "router")
    point = points.get(about.get("name") or "", {})
    plain = results["hard"] is None and results["hard_before"] is None and not point
    role = point.get("role") or ("floor" if selector == "none" else "start" if plain else "point")
    # A variant may be named like its task, alone (its methods are told by their selectors) or before the method
    task, variant = results["task"], point.get("variant")
    variant = None if variant == task else variant and variant.removeprefix(f"{task}: ")
    return Run(
        folder=folder,
        method=variant or SELECTORS.get(selector, selector),
        role=role,
        parameters=point.get("parameters", {}),
        results=results,
        histogram=views.get("score_histogram", []),
        command=point.get("command") or f"lightning fit --config {folder}/config.yaml",
        options={} if point else _options(folder / "config.yaml"),
        lte=model.get("lte", {}),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _options(file: Path) -> dict[str, Any]:
    """The configuration of a run outside of a sweep, flat; empty if there is none."""

    def flatten(value: Any, path: str) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flatten(inner, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    try:
        pairs = flatten(yaml.safe_load(file.read_text()), "")
    except (OSError, yaml.YAMLError):
        return {}
    return {key: value for key, value in pairs if not key.startswith(NO_PARAMETER) and not key.endswith(".seed")}


def _tell_apart(runs: Sequence[Run]) -> None:
    """Makes what differs between the configurations of a task's runs of a method their parameters."""
    for run in runs:
        same = [other for other in runs if (other.method, other.results["task"]) == (run.method, run.results["task"])]
        names = {key for other in same for key in other.options}
        differing = [key for key in names if len({repr(other.options.get(key)) for other in same}) > 1]
        run.parameters = {key: run.options.get(key) for key in sorted(differing)}

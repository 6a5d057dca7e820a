"""Groups runs into experiments and settings, with one run per seed."""

from collections.abc import Hashable, Iterable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from lte_lightning.report.material import Material
from lte_lightning.report.names import title_of
from lte_lightning.report.run import GFLOP, Run, setting_key
from lte_lightning.sweep.table import newest

OLDER = "because there is a newer run of the same setting and seed"


def settle(material: Material) -> None:
    """Names the runs' experiments, separates settings, leaves out repeated runs, and computes spans seed by seed."""
    name_experiments(material.runs)
    _tell_apart([run for run in material.runs if run.role == "point"])
    _drop_doubles(material)
    for task in material.tasks:
        dense, floor = material.dense(task), material.floor(task)
        for run in material.of(task):
            run.span_kept = replace(run.results, dense=dense.get(run.seed), floor=floor.get(run.seed)).span_kept
            if run.seed in dense and run.results.value is not None:
                sign = 1 if run.better(1, 0) else -1
                run.lost = sign * (dense[run.seed] - run.results.value)


# Experiments


def name_experiments(runs: list[Run]) -> None:
    """Sets ``Run.task``, the experiment's name: as much of task, metric and model as tells experiments apart."""
    keys = {id(run): _experiment(run, runs) for run in runs}
    names: dict[tuple[Any, ...], str] = {}
    for key in keys.values():
        task, metric, *_ = key
        same_task = {other for other in keys.values() if other[0] == task}
        name = task if len({other[1] for other in same_task}) == 1 else f"{task}, {metric}"
        models = sorted({other[2:] for other in same_task if other[1] == metric}, key=str)
        names[key] = name if len(models) == 1 else f"{name}, {_model_name(key[2:], models)}"
    model_of_name: dict[str, Hashable] = {}
    for model, name in names.items():
        if name in model_of_name:  # a path that ends alike in all that can be read
            name = names[model] = f"{name} ({len(model_of_name)})"
        model_of_name[name] = model
    titled: dict[Hashable, str] = {}
    for run in runs:
        key = keys[id(run)]
        run.task = names[key]
        if key not in titled:
            metrics = {other[1] for other in names if other[0] == key[0]}
            title = title_of(run.results, key[2], key[4], metrics)
            titled[key] = title if title not in titled.values() else f"{title}: {run.task}"
        run.title = titled[key]


def _experiment(run: Run, runs: Iterable[Run]) -> tuple[Any, ...]:
    return *_base(run), _layers(run, runs)


def _base(run: Run) -> tuple[Any, ...]:
    results, options = run.results, run.options
    pretrained = options.get("model.pretrained") or options.get("start.model.pretrained")
    return results.task, results.metric, pretrained, results.dense_flops_per_token


def _layers(run: Run, runs: Iterable[Run]) -> int | None:
    """Returns the number of layers of a run's model; for a dense run, from a run of the same experiment."""
    if layers := run.results.sparsity_per_layer:
        return len(layers)
    same_base = [other for other in runs if _base(other) == _base(run) and other.results.sparsity_per_layer]
    same_folder = [other for other in same_base if other.folder.parent == run.folder.parent] or same_base
    counts = {len(other.results.sparsity_per_layer or ()) for other in same_folder}
    return counts.pop() if len(counts) == 1 else None


def _model_name(model: tuple[Any, ...], models: list[tuple[Any, ...]]) -> str:
    pretrained, flops, layers = model
    names = {str(other[0]) for other in models}
    words = []
    if len(names) > 1:
        ends = [PurePosixPath(name).name for name in names]
        words.append(PurePosixPath(str(pretrained)).name if len(set(ends)) == len(names) else str(pretrained))
    alike = [other for other in models if other[0] == pretrained]
    if len({other[2] for other in alike}) > 1:
        words.append(f"{layers} layers" if layers else "layers unknown")
    elif len(alike) > 1:
        words.append(f"{flops / GFLOP:.4g} GFLOPs dense")
    return ", ".join(words)


# Settings


def _tell_apart(runs: list[Run]) -> None:
    """Adds the options that differ among an experiment's runs of one method to their parameters."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.method), []).append(run)
    for same in groups.values():
        values: dict[str, set[str]] = {}
        recorded = [run.options for run in same if run.options]
        for options in recorded:
            for key in {key for other in recorded for key in other}:
                if key in options or not key.startswith("start."):  # the start of some runs is gone
                    values.setdefault(key, set()).add(repr(options.get(key)))
        names = dict.fromkeys(key for run in same for key in run.parameters)
        names |= dict.fromkeys(sorted(key for key, different in values.items() if len(different) > 1))
        for run in same:
            options = run.options | run.parameters
            run.parameters = {key: options.get(key) for key in names if run.options or key in run.parameters}


def _drop_doubles(material: Material) -> None:
    def key(run: Run) -> Hashable:
        return (setting_key(run), run.seed) if run.role == "point" else id(run)

    newest_runs = {key(run): run for run in sorted(material.runs, key=lambda run: newest(run.folder))}
    doubles = [run for run in material.runs if newest_runs[key(run)] is not run]
    material.left_out += [(run.folder.name, OLDER) for run in doubles if run.test is None]
    material.runs = [run for run in material.runs if newest_runs[key(run)] is run]

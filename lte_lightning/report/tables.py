"""The tables of a report, as rows of text, and what can be said of them in plain words."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lte_lightning.report.collect import Material, Setting
from lte_lightning.sweep.table import better, mean_text

GFLOP = 2**30  # as the paper counts
# What a method may lose and still count as good as dense: the paper's of Table 1, and a point elsewhere
TOLERANCES = {"perplexity": 0.5, "rouge": 0.05}
TOLERANCE = 0.01
# Two points below the sparsities that one asks a method for, since a calibrated one lands beside them
LEVELS = (0.48, 0.68, 0.78, 0.88)
# What the paper and its successors compare: a report says which of them it lacks
RIVALS = (
    *("dense", "narrower dense", "KLA", "MoEfication", "Deja Vu", "TEAL", "CATS", "D2DMoE", "softmax top-k"),
    *("random routers", "sigma-MoE", "Wanda", "LTE"),
)


@dataclass(frozen=True)
class Table:
    """Heads and rows of text; the first column names the row."""

    heads: list[str]
    rows: list[list[str]]


def tolerance_of(metric: str, given: float | None) -> float:
    """Returns how much of a metric may be lost."""
    if given is not None:
        return given
    return next((value for name, value in TOLERANCES.items() if metric.lower().startswith(name)), TOLERANCE)


def dense_of(material: Material, task: str) -> float | None:
    """Returns the mean of a task's dense figures."""
    found = material.reference(task, "dense")
    return statistics.fmean(found) if found else None


def tolerated(material: Material, task: str, method: str, tolerance: float | None) -> list[Setting]:
    """Returns the settings of a method that lose no more of a task's metric than is tolerated, by mean."""
    dense, metric = dense_of(material, task), material.tasks[task]
    if dense is None:
        return []
    limit, found = tolerance_of(metric, tolerance), []
    for setting in material.settings(task):
        value = setting.mean("value")
        if setting.method == method and value is not None:
            lost = value - dense if better(metric, 0, 1) else dense - value
            found += [setting] if lost <= limit + 1e-9 else []
    return found


def flops(material: Material, tolerance: float | None) -> Table:
    """Returns the fewest GFLOPs per token at the tolerated loss, as the paper's Table 1."""
    tasks = list(material.tasks)
    methods = list(dict.fromkeys(setting.method for setting in material.settings()))
    heads = ["", *(f"{task} (≤ {tolerance_of(material.tasks[task], tolerance):g} lost)" for task in tasks)]
    dense = {
        task: next(run.results["dense_flops_per_token"] for run in material.runs if run.results["task"] == task)
        for task in tasks
    }
    rows = [["dense", *(f"{dense[task] / GFLOP:.4g}" for task in tasks)]]
    for method in methods:
        cells = []
        for task in tasks:
            mine = tolerated(material, task, method, tolerance)
            if not any(setting.method == method for setting in material.settings(task)):
                cells.append("not run")
            elif not mine:
                cells.append("none within" if dense_of(material, task) is not None else "no dense figure")
            else:
                best = min(mine, key=lambda setting: setting.mean("flops_per_token"))
                cost = best.mean("flops_per_token")
                cells.append(f"{cost / GFLOP:.4g} ({dense[task] / cost:.2f}x, {100 * best.sparsity:.0f} % off)")
        rows.append([method, *cells])
    return Table(heads, rows)


def levels(material: Material, task: str) -> Table:
    """Returns the best mean figure that each method has at about 50, 70, 80 and 90 % sparsity, or more."""
    settings, metric = material.settings(task), material.tasks[task]
    rows = []
    for method in dict.fromkeys(setting.method for setting in settings):
        cells = []
        for level in LEVELS:
            mine = [s for s in settings if s.method == method and s.sparsity >= level and s.values("value")]
            best = None
            for setting in mine:
                if best is None or better(metric, setting.mean("value"), best.mean("value")):
                    best = setting
            cells.append(f"{mean_text(best.values('value'))} at {100 * best.sparsity:.0f} %" if best else "–")
        rows.append([method, *cells])
    return Table(["", *(f"≥ {100 * level:.0f} % off" for level in LEVELS)], rows)


def everything(material: Material, task: str) -> Table:
    """Returns every setting of a task with its figures, means and deviations over the seeds."""
    heads = [
        "method",
        "parameters",
        "seeds",
        "sparsity",
        material.tasks[task],
        "before adaptation",
        "span kept",
        "GFLOPs/token",
        "bound",
    ]
    timed = any(setting.values("speedup") for setting in material.settings(task))
    heads += ["measured"] if timed else []
    rows = []
    for setting in material.settings(task):
        seeds = ", ".join(str(seed) for seed in sorted({run.results["seed"] for run in setting.runs}))
        rows.append(
            [
                *(setting.method, setting.label, seeds),
                mean_text([run.sparsity for run in setting.runs], 100, " %", 1),
                mean_text(setting.values("value")),
                mean_text(setting.values("hard_before")),
                mean_text(setting.values("span_kept"), 100, " %", 0),
                mean_text(setting.values("flops_per_token"), 1 / GFLOP),
                mean_text(setting.values("bound"), digits=2, unit="x"),
                *([mean_text(setting.values("speedup"), digits=2, unit="x")] if timed else []),
            ]
        )
    return Table(heads, rows)


def versions(material: Material) -> Table:
    """Returns the versions and machines that the runs had, each with their number."""
    found = [run.results.get("versions", {}) for run in material.runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    groups: dict[tuple[str, ...], int] = {}
    for one in found:
        key = tuple(str(one.get(name, "")) for name in names)
        groups[key] = groups.get(key, 0) + 1
    heads = ["", *(f"{count} runs" for count in groups.values())]
    return Table(heads, [[name, *(key[i] for key in groups)] for i, name in enumerate(names)])


def summary(material: Material, tolerance: float | None) -> list[str]:
    """Says what was found, a sentence or two for each task and method."""
    lines = []
    for task, metric in material.tasks.items():
        dense, floors = material.reference(task, "dense"), material.reference(task, "floor")
        line = f"{task}: the dense model reaches {metric} {mean_text(dense)}" if dense else f"{task}: no dense figure"
        if floors:
            line += f"; with every FFN expert off and adapted alike, the floor, {mean_text(floors)}"
        lines.append(f"{line}.")
        limit = tolerance_of(metric, tolerance)
        for method in dict.fromkeys(setting.method for setting in material.settings(task)):
            within = tolerated(material, task, method, tolerance)
            if within:
                best = max(within, key=lambda setting: setting.sparsity)
                kept = best.values("span_kept")
                span = f" and keeps {mean_text(kept, 100, ' %', 0)} of the span from floor to dense" if kept else ""
                lines.append(
                    f"{task}: {method} loses at most {limit:g} up to {100 * best.sparsity:.0f} % of the FFN neurons "
                    f"off ({metric} {mean_text(best.values('value'))}){span}."
                )
            elif dense:
                lines.append(f"{task}: {method} loses more than {limit:g} at every setting that was run.")
    return lines


def not_run(material: Material) -> list[str]:
    """Says what a reader might expect, and what there are no figures of."""
    lines = [f"Not done: {name} ({status})." for name, status in material.missing[:20]]
    if len(material.missing) > 20:
        lines.append(f"And {len(material.missing) - 20} more points are not done.")
    methods = {_plain(run.method) for run in material.runs}
    absent = [name for name in RIVALS if name != "dense" and not any(_plain(name) in method for method in methods)]
    if absent:
        lines.append(f"No figures of: {', '.join(absent)}.")
    single = [s for s in material.settings() if len({run.results["seed"] for run in s.runs}) < 2]
    if single:
        lines.append(f"One seed only, so no spread is known: {len(single)} of {len(material.settings())} settings.")
    for task in material.tasks:
        for key, name in (("dense", "dense model"), ("floor", "floor")):
            if not material.reference(task, key):
                lines.append(f"The {name} of {task} was not measured.")
    if not any(run.results.get("union_sparsity") for run in material.runs):
        lines.append("Union sparsity against batch size was not measured.")
    if not material.bench and not any(run.results.get("speedup") for run in material.runs):
        lines.append(
            "No latency was measured: FLOPs saved are not time saved (run.latency_rows of a fit, or lte bench and "
            "--bench of this command)."
        )
    return lines


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def pick(settings: Sequence[Setting], count: int) -> list[Setting]:
    """Returns so many settings, evenly from the least sparse to the sparsest."""
    if len(settings) <= count:
        return list(settings)
    return [settings[round(i * (len(settings) - 1) / (count - 1))] for i in range(count)]

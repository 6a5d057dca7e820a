"""The tables of a report, as rows of text, and what can be said of them in plain words."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lte_lightning.report.loss import figure_text, kept_text, percent, sentence, tolerance_of, tolerated
from lte_lightning.report.material import GFLOP, UNTRAINED, Material, Missing, Run, Setting
from lte_lightning.report.methods import RIVALS, describe, marked
from lte_lightning.results import better
from lte_lightning.sweep.table import mean_text

# Percent, two points below the sparsities that one asks a method for, since a calibrated one lands beside them
LEVELS = (48, 68, 78, 88)
# Options with which a fit sees a part of the rows
PARTS = ("data.train_rows", "trainer.limit_train_batches", "trainer.limit_val_batches")
LINES = 20  # of a list, before it is cut


@dataclass(frozen=True)
class Table:
    """Heads and rows of text; the first column names the row."""

    heads: list[str]
    rows: list[list[str]]


def flops(material: Material, tolerance: float | None) -> Table:
    """Returns the fewest GFLOPs per token at the tolerated loss, as the paper's Table 1.

    A method's name bears what its figures must not be read without: that it is an oracle, or skips weights.
    """
    tasks = list(material.tasks)
    heads = ["", *(f"{task} (≤ {tolerance_of(material.tasks[task], tolerance):g} lost)" for task in tasks)]
    dense = {task: material.of(task)[0].results.dense_flops_per_token for task in tasks}
    rows = [["dense", *(f"{dense[task] / GFLOP:.4g}" for task in tasks)]]
    names = {setting.method: marked(setting.method, setting.runs[0].lte) for setting in material.settings()}
    for method, name in names.items():
        rows.append([name, *(_cell(material, task, method, tolerance, dense[task]) for task in tasks)])
    return Table(heads, rows)


def _cell(material: Material, task: str, method: str, tolerance: float | None, dense: float) -> str:
    found = tolerated(material, task, method, tolerance)
    if not found.within:
        return "none within" if found.beyond else "no dense figure" if found.unread else "not run"
    costs = [statistics.fmean(setting.values("flops_per_token")) for setting in found.within]
    cost, best = min(zip(costs, found.within, strict=True), key=lambda pair: pair[0])
    failing = found.failing_below(best.sparsity)
    though = f", though not at {percent(failing)}" if failing else ""
    return f"{cost / GFLOP:.4g} ({dense / cost:.2f}x, {100 * best.sparsity:.0f} % off{though})"


def levels(material: Material, task: str) -> Table:
    """Returns the best mean figure that each method has at about 50, 70, 80 and 90 % sparsity, or more."""
    settings, metric = material.settings(task), material.tasks[task]
    rows = []
    for method in dict.fromkeys(setting.method for setting in settings):
        cells = []
        for level in LEVELS:
            mine = [s for s in settings if s.method == method and round(100 * s.sparsity) >= level]
            best, highest = None, None
            for setting in mine:
                value = setting.mean("value")
                if value is not None and (highest is None or better(metric, value, highest)):
                    best, highest = setting, value
            undefined = "undefined" if mine else "–"
            cells.append(f"{figure_text(best)} at {100 * best.sparsity:.0f} %" if best else undefined)
        rows.append([next(s.called for s in settings if s.method == method), *cells])
    return Table(["best mean at FFN sparsity", *(f"≥ {level} % off" for level in LEVELS)], rows)


def everything(material: Material, task: str) -> Table:
    """Returns every setting of a task with its figures, means and deviations over the seeds."""
    settings = [*material.settings(task, dense=True), *material.settings(task)]
    dense, metric = material.dense(task), material.tasks[task]
    columns = {
        "method": lambda s: s.called,
        "parameters": lambda s: s.label,
        "seeds": lambda s: ", ".join(map(str, s.seeds)),
        "sparsity": lambda s: mean_text([run.sparsity for run in s.runs], 100, " %", 1),
        INNER: lambda s: mean_text(s.values(_inner), 100, " %", 1),
        metric: figure_text,
        "lost": lambda s: "undefined" if s.undefined else mean_text(s.lost(dense)),
        "dense start": lambda s: mean_text(s.values("dense")),
        "before adaptation": lambda s: mean_text(s.values("hard_before")),
        "span kept": kept_text,
        "GFLOPs/token": lambda s: mean_text(s.values("flops_per_token"), 1 / GFLOP),
        "bound by bytes moved": lambda s: mean_text(s.values("bound"), digits=2, unit="x"),
        "measured": lambda s: mean_text(s.values("speedup"), digits=2, unit="x"),
    }
    wanted = {
        INNER: any(setting.values(_inner) for setting in settings),
        "dense start": len(starts(material, task)) > 1,
        "measured": any(setting.values("speedup") for setting in settings),
    }
    shown = {head: text for head, text in columns.items() if wanted.get(head, True)}
    return Table(list(shown), [[text(setting) for text in shown.values()] for setting in settings])


INNER = "sparsity without the last layer"


def _inner(run: Run) -> float | None:
    return run.inner_sparsity


def starts(material: Material, task: str) -> list[tuple[list[str], list[float]]]:
    """Returns which methods start from which dense model, and its figures over the seeds."""
    groups: list[tuple[list[str], dict[int, float]]] = []
    for run in material.of(task):
        own = run.results.dense
        if run.role == "point" and own is not None:
            known = next((one for one in groups if abs(one[1].get(run.seed, math.inf) - own) <= 1e-9), None)
            same = (one for one in groups if run.method in one[0] and run.seed not in one[1])
            known = known or next(same, None)
            if known is None:
                groups.append(known := ([], {}))
            known[0].extend([run.method] if run.method not in known[0] else [])
            known[1].setdefault(run.seed, own)
    return [(methods, list(found.values())) for methods, found in groups]


def versions(material: Material) -> Table:
    """Returns the versions and machines that the runs had, each with their number."""
    found = [run.results.versions for run in material.fits]
    names = list(dict.fromkeys(name for one in found for name in one))
    groups: dict[tuple[str, ...], int] = {}
    for one in found:
        key = tuple("–" if one.get(name) is None else str(one[name]) for name in names)
        groups[key] = groups.get(key, 0) + 1
    heads = ["", *(f"{count} runs" for count in groups.values())]
    return Table(heads, [[name, *(key[i] for key in groups)] for i, name in enumerate(names)])


def summary(material: Material, tolerance: float | None) -> list[str]:
    """Says what was found, a sentence or two for each task and method."""
    lines = []
    for task, metric in material.tasks.items():
        dense, floors = material.reference(task, "dense"), material.reference(task, "floor")
        line, kind = f"{task}: no dense figure", material.dense_kind(task)
        if dense:
            own = material.starts(task)
            line = f"{task}: the reference ({kind}) reaches {metric} {mean_text(dense)}"
            line += f", before that {mean_text(own)}" if kind != UNTRAINED and own else ""
        if floors:
            line += f"; with every FFN expert off and {material.floor_kind(task)}, the floor, {mean_text(floors)}"
        lines.append(f"{line}.")
        if len(lengths := material.lengths(task)) > 1:
            told = "; ".join(f"{length} ({', '.join(methods)})" for length, methods in lengths.items())
            lines.append(f"{task}: not all models were trained on equally long, which may help by itself: {told}.")
        of_seeds = material.dense(task)
        lost = [found for setting in material.settings(task) if (found := setting.lost(of_seeds))]
        if kind == UNTRAINED and any(statistics.fmean(found) < 0 for found in lost):
            lines.append(
                f"{task}: some settings are better than the reference; they were trained on and it was not, as a fit "
                "of the selector narrow at target_sparsity 0 would be."
            )
        groups = starts(material, task)
        if len(groups) > 1:
            told = "; ".join(f"{mean_text(figures)} ({', '.join(methods)})" for methods, figures in groups)
            lines.append(f"{task}: the methods start from different dense models, none trained on: {told}.")
        methods = dict.fromkeys(setting.method for setting in material.settings(task))
        lines += filter(None, (sentence(material, task, method, tolerance) for method in methods))
        if any(setting.values(_inner) for setting in material.settings(task)):
            lines.append(
                f"{task}: the classifier reads the first token of the last layer alone, so a router may switch that "
                "layer's FFN off for all other tokens at no loss. The table of all settings gives the sparsity without "
                "the last layer, too."
            )
    return lines


def not_run(material: Material) -> list[str]:
    """Says what a reader might expect, and what there are no figures of."""
    lines = _cut(_missing(material.missing), "kinds of points are not done")
    reasons: dict[str, list[str]] = {}
    for name, reason in material.left_out:
        reasons.setdefault(reason, []).append(name)
    lines += [f"Left out, {reason}: {_listed(names)}." for reason, names in reasons.items()]
    lines += _absent(material)
    lines += _parts(material)
    single = [s for s in material.settings() if len(s.seeds) < 2]
    if single:
        lines.append(f"One seed only, so no spread is known: {len(single)} of {len(material.settings())} settings.")
    for task in material.tasks:
        for key, name in (("dense", "dense model"), ("floor", "floor")):
            if not material.reference(task, key):
                lines.append(f"The {name} of {task} was not measured.")
    if not any(run.results.union_sparsity for run in material.runs):
        lines.append("Union sparsity against batch size was not measured.")
    if not material.bench and not any(run.results.speedup for run in material.runs):
        lines.append(
            "No latency was measured: FLOPs saved are not time saved (run.latency_rows of a fit, or lte bench and "
            "--bench of this command)."
        )
    return lines


def _absent(material: Material) -> list[str]:
    """Which of the rivals there are no figures of: on no task, or on one of them."""

    def lacking(task: str | None) -> list[str]:
        mine = [run for run in material.of(task) if run.role == "point"]
        there = {describe(run.lte).rival for run in mine if not run.is_dense}
        return [name for name in RIVALS if name not in there]

    everywhere = lacking(None)
    lines = [f"No figures of: {', '.join(everywhere)}."] if everywhere else []
    for task in material.tasks:
        if only := [name for name in lacking(task) if name not in everywhere]:
            lines.append(f"No figures on {task} of: {', '.join(only)}.")
    return lines


def _parts(material: Material) -> list[str]:
    """Which runs were trained or measured on a part of the rows alone."""
    lines = []
    for key in PARTS:
        values = [run.options.get(key) for run in material.fits]
        # of batches 1.0 are all, and 1 is one
        given = Counter(str(value) for value in values if value is not None and str(value) != "1.0")
        lines += [f"All rows: {key} is {value} in {n} of {len(material.fits)} fits." for value, n in given.items()]
    return lines


def _missing(missing: Sequence[Missing]) -> list[str]:
    """Says which points are not done, a line for each variant and what became of it."""
    sweeps = {point.sweep for point in missing}
    groups: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for point in missing:
        seeds = groups.setdefault((point.sweep, point.method, point.status), {}).setdefault(point.parameters, [])
        seeds += [] if point.seed is None else [point.seed]
    lines = []
    for (sweep, method, status), settings in groups.items():
        by_seeds: dict[tuple[int, ...], list[str]] = {}
        for parameters, seeds in settings.items():
            by_seeds.setdefault(tuple(sorted(set(seeds))), []).append(parameters)
        told = []
        for same, alike in by_seeds.items():
            which = f"seed{'s' * (len(same) > 1)} {', '.join(map(str, same))}" if same else ""
            told.append(" of ".join(filter(None, (", ".join(filter(None, alike)), which))))
        name = ": ".join(filter(None, (sweep if len(sweeps) > 1 else "", method, "; ".join(filter(None, told)))))
        lines.append(f"Not done: {name} ({status}).")
    return lines


def _cut(lines: list[str], what: str) -> list[str]:
    more = [f"And {len(lines) - LINES} more {what}."] if len(lines) > LINES else []
    return lines[:LINES] + more


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LINES} more" if len(names) > LINES else ""
    return ", ".join(names[:LINES]) + more


def pick(settings: Sequence[Setting], count: int) -> list[Setting]:
    """Returns so many settings, evenly from the least sparse to the sparsest."""
    if len(settings) <= count:
        return list(settings)
    return [settings[round(i * (len(settings) - 1) / (count - 1))] for i in range(count)]

"""The tables of a report, as rows of text, and their summary in words."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lte_lightning.report.material import Material
from lte_lightning.report.methods import marked
from lte_lightning.report.names import counted, in_words
from lte_lightning.report.run import GFLOP, Setting
from lte_lightning.report.style import selectors
from lte_lightning.report.tolerance import percent, tolerance_of, tolerated
from lte_lightning.report.words import sentences
from lte_lightning.results import better
from lte_lightning.sweep.paired import Fits, comparisons
from lte_lightning.sweep.table import mean_text

# Percent, two points below the usual targets, because a calibrated model lands near its target
LEVELS, AT_LEVELS = (48, 68, 78, 88), "50, 70, 80 and 90 %"
INNER = "sparsity without the last layer"


@dataclass(frozen=True)
class Table:
    """A table: heads, rows of text whose first cell names the row, a caption, and a file name."""

    heads: list[str]
    rows: list[list[str]]
    caption: str = ""
    name: str = "table"


def flops(material: Material, tolerance: float | None) -> Table:
    """Returns the fewest GFLOPs per token at the tolerated loss, as in the paper's Table 1.

    A method's name carries its caveat: that it is an oracle, or skips weights.
    """
    tasks = list(material.tasks)
    heads = [
        "",
        *(f"{material.title(task)} (≤ {tolerance_of(material.tasks[task], tolerance):g} lost)" for task in tasks),
    ]
    dense = {task: material.of(task)[0].results.dense_flops_per_token for task in tasks}
    rows = [["dense", *(f"{dense[task] / GFLOP:.4g}" for task in tasks)]]
    of_tasks = {task: material.methods(task) for task in tasks}
    for method, settings in material.methods().items():
        cells = [_cheapest(of_tasks[task].get(method, []), tolerance, dense[task]) for task in tasks]
        rows.append([marked(method, settings[-1].runs[0].lte), *cells])
    return Table(heads, rows, "GFLOPs (2³⁰) per token, the saving against dense, and the FFN sparsity", "flops")


def _cheapest(settings: list[Setting], tolerance: float | None, dense: float) -> str:
    if not settings:
        return "not run"
    checked = tolerated(settings, tolerance)
    if not checked.within:
        return "none within" if checked.beyond else "no dense figure"
    costs = [statistics.fmean(setting.values("flops_per_token")) for setting in checked.within]
    cost, best = min(zip(costs, checked.within, strict=True), key=lambda pair: pair[0])
    failing = checked.failing_below(best.sparsity)
    exception = f", though not at {percent(failing)}" if failing else ""
    return f"{cost / GFLOP:.4g} ({dense / cost:.2f}x, {100 * best.sparsity:.0f} % off{exception})"


def levels(material: Material, task: str) -> Table:
    """Returns each method's best mean at about 50, 70, 80 and 90 % sparsity or more."""
    sign = 1 if better(material.tasks[task], 1, 0) else -1

    def best(settings: list[Setting], level: int) -> str:
        sparse = [setting for setting in settings if round(100 * setting.sparsity) >= level]
        means = [(sign * mean, setting) for setting in sparse if (mean := setting.mean("value")) is not None]
        if not means:
            return "undefined" if sparse else "–"
        chosen = max(means, key=lambda pair: pair[0])[1]
        return f"{chosen.figure} at {100 * chosen.sparsity:.0f} %"

    rows = [[s[0].called, *(best(s, level) for level in LEVELS)] for s in material.methods(task).values()]
    caption = (
        f"Best {in_words(material.tasks[task])} at about {AT_LEVELS} FFN sparsity or more on {material.title(task)}"
    )
    return Table(
        ["best mean at FFN sparsity", *(f"≥ {level} % off" for level in LEVELS)], rows, caption, f"levels-{task}"
    )


def differences(material: Material, task: str) -> Table | None:
    """Returns the differences of LTE's settings (or the first method's) to the other methods' at similar sparsity.

    Seeds are paired, and so are rows if the fits saved draws of them. None if nothing can be compared.
    """
    settings, dense = material.settings(task), material.settings(task, dense=True)
    order = list(selectors(settings))
    named_settings = [(s.called, s) for s in sorted(settings, key=lambda s: order.index(s.method))]
    named_settings += [("dense, trained on", s) for s in dense]
    fits = [Fits(name, s.label.strip("–"), {run.seed: run.results for run in s.runs}) for name, s in named_settings]
    rows = [[ours.called, theirs.called, str(gap.seeds), gap.text()] for ours, theirs, gap in comparisons(fits)]
    metric = in_words(material.tasks[task])
    caption = f"Is it better? Paired differences of {metric} on {material.title(task)}, with 95 % intervals"
    heads = [f"{metric} of", "minus that of", "seeds", "difference"]
    return Table(heads, rows, caption, f"differences-{task}") if rows else None


def everything(material: Material, task: str) -> Table:
    """Returns all settings of a task, with means and deviations over the seeds."""
    settings = [*material.settings(task, dense=True), *material.settings(task)]
    columns = {
        "method": lambda s: s.called,
        "parameters": lambda s: s.label,
        "seeds": lambda s: ", ".join(map(str, s.seeds)),
        "sparsity": lambda s: mean_text(s.values("sparsity"), 100, " %", 1),
        INNER: lambda s: mean_text(s.values("inner_sparsity"), 100, " %", 1),
        material.tasks[task]: lambda s: s.figure,
        "lost": lambda s: "undefined" if s.undefined else mean_text(s.values("lost")),
        "dense start": lambda s: mean_text(s.values("dense")),
        "before adaptation": lambda s: mean_text(s.values("hard_before")),
        "span kept": lambda s: s.kept,
        "GFLOPs/token": lambda s: mean_text(s.values("flops_per_token"), 1 / GFLOP),
        "bound by bytes moved": lambda s: mean_text(s.values("bound"), digits=2, unit="x"),
        "measured": lambda s: mean_text(s.values("speedup"), digits=2, unit="x"),
    }
    conditions = {
        INNER: any(setting.values("inner_sparsity") for setting in settings),
        "dense start": len(material.own_starts(task)) > 1,
        "measured": any(setting.values("speedup") for setting in settings),
    }
    shown_columns = {head: text for head, text in columns.items() if conditions.get(head, True)}
    rows = [[text(setting) for text in shown_columns.values()] for setting in settings]
    caption = f"All settings of {material.title(task)}: {counted(len(rows), 'row')}"
    return Table(list(shown_columns), rows, caption, f"settings-{task}")


def versions(material: Material) -> Table:
    """Returns the versions and machines of the runs, each with its number of runs."""
    per_run = [run.results.versions for run in material.fits]
    names = list(dict.fromkeys(name for versions in per_run for name in versions))
    counts = Counter(
        tuple("–" if (v := versions.get(name)) is None else str(v) for name in names) for versions in per_run
    )
    heads = ["", *(counted(count, "run") for count in counts.values())]
    rows = [[name, *(key[i] for key in counts)] for i, name in enumerate(names)]
    return Table(heads, rows, "Versions and machine of the runs", "versions")


def summary(material: Material, task: str, tolerance: float | None) -> list[str]:
    """Summarises a task: the reference, each method, and in one sentence the methods that lose more."""
    return sentences("summary", material, task, tolerance)


def not_run(material: Material) -> list[str]:
    """Lists results that a reader might expect and that are missing."""
    return sentences("not_run", material)


def pick(settings: Sequence[Setting], count: int) -> list[Setting]:
    """Returns ``count`` settings, evenly spaced from the least to the most sparse."""
    if len(settings) <= count:
        return list(settings)
    return [settings[round(i * (len(settings) - 1) / (count - 1))] for i in range(count)]

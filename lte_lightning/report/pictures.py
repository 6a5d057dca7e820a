"""The pictures of a report, each in a light and a dark version."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lte_lightning.report.bench import title
from lte_lightning.report.material import Material
from lte_lightning.report.methods import describe
from lte_lightning.report.run import Run, Setting
from lte_lightning.report.style import DARK, KNOWN, LIGHT, Style
from lte_lightning.results import better

# In inches and points. A phone shows a picture 358 px wide; letters are 11.8 px high there
WIDTH, LETTERS, DPI = 4.2, 10, 200
HEIGHT = 3.3  # without the legend
LINE = 0.175  # of text
LEGEND_LETTERS, NAME_LETTERS = 22, 22  # before a label is broken
MADE_BY = "lte report"  # in each picture, so that it can be told from other people's
# How far below the floor a picture goes on, as a share of the span from floor to dense; and of how many settings, at
# most, it may leave out what lies below that; and how many times as far away as the others a floor is left out
BELOW, HIDDEN, FAR = 0.15, 0.15, 5

Draw = Callable[[Figure], None]


def _style(theme: dict[str, str]) -> dict[str, Any]:
    ink = {key: theme["ink"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    paper = {key: theme["paper"] for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")}
    lines = {"axes.edgecolor": theme["ink"], "grid.color": theme["grid"]}
    sizes = {"axes.labelsize": LETTERS, "xtick.labelsize": LETTERS, "ytick.labelsize": LETTERS, "axes.titlesize": 11}
    return ink | paper | lines | sizes | {"font.size": LETTERS, "legend.fontsize": LETTERS, "axes.axisbelow": True}


def render(draw: Draw) -> tuple[bytes, bytes]:
    """Returns two PNGs of a picture, one for light pages and one for dark ones."""
    found = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(_style(theme)):  # type: ignore[arg-type]  # its keys are a list of words
            figure, buffer = Figure(figsize=(WIDTH, HEIGHT), layout="constrained"), io.BytesIO()
            draw(figure)
            figure.savefig(buffer, dpi=DPI, metadata={"Software": MADE_BY})
            found.append(buffer.getvalue())
    return found[0], found[1]


def vector(draw: Draw, form: str) -> bytes:
    """Returns a picture for print, on white: ``svg`` or ``pdf``, the same bytes each time."""
    fixed: dict[str, Any] = {"Date": None} if form == "svg" else {"CreationDate": None}
    options = _style(LIGHT) | {"savefig.facecolor": "white", "svg.hashsalt": MADE_BY, "pdf.fonttype": 42}
    with matplotlib.rc_context(options):  # type: ignore[arg-type]
        figure, buffer = Figure(figsize=(WIDTH, HEIGHT), layout="constrained"), io.BytesIO()
        draw(figure)
        figure.savefig(buffer, format=form, metadata={"Creator": MADE_BY, **fixed})
    return buffer.getvalue()


def quality(
    material: Material, task: str, looks: Mapping[str, Style], key: str = "value", by_flops: bool = False
) -> Draw:
    """Draws quality, or the share of the span kept, against sparsity or FLOPs: means, and the range over the seeds.

    Args:
        material: What is reported.
        task: Whose points.
        looks: Of the methods; drawn in this order, the first above the others.
        key: ``value`` or ``span_kept``.
        by_flops: Whether the horizontal axis is the share of the dense model's FLOPs per token.
    """
    scale = 100 if key == "span_kept" else 1
    across = "flops_share" if by_flops else "sparsity"
    drawn: dict[str, list[Setting]] = {}
    for setting in material.settings(task):
        if setting.values(key) and setting.values(across) and not setting.undefined:
            drawn.setdefault(setting.method, []).append(setting)

    def draw(figure: Figure) -> None:
        axes, handles, ink = figure.add_subplot(), [], matplotlib.rcParams["text.color"]
        references = _references(material, task, key)
        dense, floor = (float(np.mean(values)) if values else None for values in references)
        values = {method: [scale * value for s in mine for value in s.values(key)] for method, mine in drawn.items()}
        limits = None
        is_span = key == "span_kept" or better(material.tasks[task], dense or 0.0, floor or 0.0)
        if values and dense is not None and floor is not None and is_span:
            own = values.get(next(iter(looks)), [])
            limits = _limits([value for found in values.values() for value in found], own, dense, floor)
        for i, method in enumerate(name for name in looks if name in drawn):
            mine, options = drawn[method], looks[method].options | {"zorder": 9 - i / 100}
            means = [(100 * fmean(s.values(across)), scale * fmean(s.values(key)), s) for s in mine]
            points = sorted(means, key=lambda point: point[:2])
            axes.plot([x for x, _, _ in points], [mean for _, mean, _ in points], **options)
            for x, _, setting in points:
                seeds = [scale * value for value in setting.values(key)]
                if len(seeds) > 1:
                    axes.vlines(x, min(seeds), max(seeds), color=options["color"], linewidth=1, alpha=0.7)
            outside = limits and not any(limits[0] <= mean <= limits[1] for _, mean, _ in points)
            label = mine[0].called + " (beyond the picture)" * bool(outside)
            handles.append(Line2D([], [], **options, label=label))
        for reference, line in zip(references, ("--", ":"), strict=True):
            if reference:
                axes.axhline(fmean(reference), color=ink, linestyle=line, linewidth=1.2)
                axes.axhspan(min(reference), max(reference), color=ink, alpha=0.08, linewidth=0)
        if limits:
            axes.set_ylim(*limits)
        _name_references(axes, dense, floor)
        label = material.tasks[task] if key == "value" else "dense-to-floor span kept (%)"
        below = "FLOPs per token (% of dense)" if by_flops else "FFN sparsity (%)"
        axes.set(xlabel=below, ylabel=label, title=task)
        axes.grid(visible=True)
        _legend(figure, handles)

    return draw


def _references(material: Material, task: str, key: str) -> tuple[list[float], list[float]]:
    if key == "span_kept":
        return [100.0], [0.0]
    return material.reference(task, "dense"), material.reference(task, "floor")


def _limits(values: Sequence[float], own: Sequence[float], dense: float, floor: float) -> tuple[float, float]:
    """Returns what is seen of the vertical axis.

    A few settings far beyond the floor would press the rest together: of all but LTE's, ``own``, some are left out. So
    would a floor far below all of them.
    """
    sign = 1 if floor < dense else -1
    high, top = sign * dense, max(sign * value for value in (*values, dense))
    all_but_few = min([*(sign * value for value in own), np.quantile([sign * value for value in values], HIDDEN)])
    low = all_but_few
    if high - sign * floor <= FAR * (top - all_but_few):
        edge = sign * floor - BELOW * (high - sign * floor)
        low = max(min(sign * value for value in (*values, dense, floor)), min(edge, all_but_few))
    margin = 0.04 * (top - low)
    bottom, ceiling = sorted((sign * (low - margin), sign * (top + margin)))
    return bottom, ceiling


def _name_references(axes: Axes, dense: float | None, floor: float | None) -> None:
    low, high = axes.get_ylim()
    named = [(value, name) for value, name in ((dense, "dense"), (floor, "floor")) if value is not None]
    # one beyond the picture is named at its edge, with its figure
    named = [(min(max(v, low), high), name if low <= v <= high else f"{name}\n{v:.3g}") for v, name in named]
    right = axes.secondary_yaxis("right")
    right.set_yticks([value for value, _ in named], [name for _, name in named])
    right.tick_params(length=0)
    if len(named) == 2 and abs(named[0][0] - named[1][0]) < 0.07 * abs(high - low):
        upper = max(named)[1]
        for tick in right.get_yticklabels():
            tick.set_verticalalignment("bottom" if tick.get_text() == upper else "top")


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Puts the legend below the axes, in two columns, and makes the figure as much higher."""
    labels = [textwrap.fill(str(handle.get_label()), LEGEND_LETTERS) for handle in handles]
    if not labels:
        return
    first = (len(labels) + 1) // 2
    lines = max(sum(label.count("\n") + 1 for label in half) for half in (labels[:first], labels[first:]))
    figure.set_figheight(figure.get_figheight() + LINE * lines + 0.15)
    space = {"columnspacing": 1.0, "handlelength": 2.2, "handletextpad": 0.4, "borderpad": 0.1, "labelspacing": 0.25}
    figure.legend(list(handles), labels, loc="outside lower center", ncols=2, frameon=False, **space)


def named(setting: Setting) -> str:
    """Returns a setting's method and its sparsity, which is what pictures of single settings call it."""
    # what a line is not broken at
    return f"{setting.called}, {100 * setting.sparsity:.0f}\N{NO-BREAK SPACE}%"


def layers(settings: Sequence[Setting]) -> Draw:
    """Draws the sparsity of each layer (the paper's figure 16), a row for each setting."""

    def draw(figure: Figure) -> None:
        names = [textwrap.fill(named(setting), NAME_LETTERS) for setting in settings]
        figure.set_figheight(1.2 + sum(0.1 + LINE * (name.count("\n") + 1) for name in names))
        axes = figure.add_subplot()
        grid = [100 * np.mean(setting.values("sparsity_per_layer"), axis=0) for setting in settings]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, label="FFN sparsity (%)", orientation="horizontal", fraction=0.35 / len(names))

    return draw


def scores(settings: Sequence[Setting], looks: Mapping[str, Style]) -> Draw:
    """Draws how scores are distributed (the paper's figure 3), over all layers and seeds; dashed are the thresholds."""

    def draw(figure: Figure) -> None:
        axes, handles, least = figure.add_subplot(), [], 0.1
        for setting in settings:
            counts = np.sum([np.sum(run.histogram, axis=0) for run in setting.runs if run.histogram], axis=0)
            shares = np.where(counts > 0, 100 * counts / counts.sum(), np.nan)
            least = min(least, np.nanmin(shares))
            options = looks[setting.method].options | {"marker": ""}
            line = {key: options[key] for key in ("color", "linestyle", "linewidth")}
            axes.stairs(shares, np.linspace(0, 1, len(counts) + 1), baseline=None, **line)
            handles.append(Line2D([], [], **options, label=named(setting)))
        for threshold in sorted({run.lte["threshold"] for s in settings for run in s.runs if has_threshold(run)}):
            axes.axvline(threshold, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
        axes.set(xlabel="score", ylabel="share of scores (%)", yscale="log", xlim=(0, 1), ylim=(least / 1.5, 150))
        # 10^-2 has letters too small to read
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        _legend(figure, handles)

    return draw


def has_threshold(run: Run) -> bool:
    """Says whether experts of a run were chosen by a threshold on their score."""
    description = describe(run.lte)
    return description.graded and not description.scales and "threshold" in run.lte


def union(settings: Sequence[Setting], looks: Mapping[str, Style]) -> Draw:
    """Draws the share of experts that no token of a batch needs, against its rows (the paper's figure 15)."""

    def draw(figure: Figure) -> None:
        axes, handles, ticks = figure.add_subplot(), [], set()
        for setting in settings:
            found = setting.values("union_sparsity")
            sizes = sorted({int(size) for one in found for size in one})
            means = [100 * np.mean([one[str(size)] for one in found if str(size) in one]) for size in sizes]
            options = looks[setting.method].options
            axes.plot(sizes, means, **options)
            handles.append(Line2D([], [], **options, label=named(setting)))
            ticks |= set(sizes)
        axes.set(xlabel="rows of a batch", ylabel="experts that no token needs (%)", xscale="log", ylim=(0, 100))
        axes.set_xticks(sorted(ticks), [str(size) for size in sorted(ticks)])
        axes.minorticks_off()
        axes.grid(visible=True)
        _legend(figure, handles)

    return draw


def latency(rows: Sequence[dict[str, Any]], several_files: bool = False) -> Draw:
    """Draws how many times as fast as dense each backend is, against sparsity, and the bound that memory sets.

    Args:
        rows: Of one group of `bench.groups`.
        several_files: Whether the title names the file.
    """

    def means(key: str, backend: str | None = None) -> tuple[list[float], list[float]]:
        mine = [row for row in rows if backend in (None, row["backend"])]
        at = sorted({row["sparsity"] for row in mine})
        return [100 * x for x in at], [np.mean([row[key] for row in mine if row["sparsity"] == x]) for x in at]

    def draw(figure: Figure) -> None:
        axes, handles, ink = figure.add_subplot(), [], matplotlib.rcParams["text.color"]
        looks = list(KNOWN.values())
        for i, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            handles += axes.plot(*means("ratio", backend), **looks[i % len(looks)].options, label=backend)
        handles += axes.plot(*means("bound"), ":", color=ink, label="bound", linewidth=1.2)
        axes.axhline(1, color=ink, linestyle="--", linewidth=1)
        heading = textwrap.fill(title(rows, several_files), 44)
        axes.set(xlabel="sparsity (%)", ylabel="times as fast as dense", ylim=(0, None))
        axes.set_title(heading, fontsize=LETTERS)
        axes.grid(visible=True)
        _legend(figure, handles)

    return draw

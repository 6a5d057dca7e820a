"""Renders pictures in a light and a dark version, and draws those of quality."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lte_lightning.report.bench import metric_of
from lte_lightning.report.material import Material
from lte_lightning.report.names import in_words, is_unbounded
from lte_lightning.report.run import Setting
from lte_lightning.report.style import DARK, LIGHT, STRONG, Style
from lte_lightning.results import better

# In inches and points. A phone shows a picture 358 px wide, with letters 11.8 px high
WIDTH, LETTERS, DPI = 4.2, 10, 200
HEIGHT = 3.3  # without the legend
LINE = 0.175  # of text
LEGEND_LETTERS, NAME_LETTERS, TITLE_LETTERS = 22, 22, 44  # before a label is broken
DENSE = Style("ink", "s", "")
MADE_BY = "lte report"  # a mark in each picture, to tell it from the user's own
# How far below the floor a picture goes on, as a share of the span from floor to dense; and of how many settings, at
# most, it may leave out what lies below that; and how many times as far away as the others a floor is left out
BELOW, HIDDEN, FAR = 0.15, 0.15, 5

Draw = Callable[[Figure], str]  # draws, and returns the alternative text


@dataclass(frozen=True)
class Axis:
    """A horizontal axis.

    Args:
        key: The key of `Setting.values`.
        label: Label of the axis.
        unit: Unit after a value in a sentence.
        scale: Factor of the values.
        least: Smallest span of the axis, so that small differences do not look large.
    """

    key: str
    label: str
    unit: str = "\N{NO-BREAK SPACE}%"
    scale: float = 100.0
    least: float = 20.0


SPARSITY = Axis("sparsity", "FFN sparsity (%)")
FLOPS = Axis("flops_share", "FLOPs per token (% of dense)")
SPEED = Axis("tokens_per_second", "tokens per second, measured", "\N{NO-BREAK SPACE}tokens/s", 1.0, 0.0)


def _style(theme: dict[str, str]) -> dict[str, Any]:
    ink = {key: theme["ink"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    paper = {key: theme["paper"] for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")}
    lines = {"axes.edgecolor": theme["ink"], "grid.color": theme["grid"]}
    sizes = {"axes.labelsize": LETTERS, "xtick.labelsize": LETTERS, "ytick.labelsize": LETTERS, "axes.titlesize": 11}
    return ink | paper | lines | sizes | {"font.size": LETTERS, "legend.fontsize": LETTERS, "axes.axisbelow": True}


def render(draw: Draw) -> tuple[bytes, bytes, str]:
    """Returns two PNGs of a picture, for light and for dark pages, and its alternative text."""
    (light, words), (dark, _) = (
        _saved(draw, _style(theme), format="png", dpi=DPI, metadata={"Software": MADE_BY}) for theme in (LIGHT, DARK)
    )
    return light, dark, words


def vector(draw: Draw, form: str) -> bytes:
    """Returns a picture for print, on white: ``svg`` or ``pdf``, the same bytes each time."""
    fixed = {"Date": None} if form == "svg" else {"CreationDate": None}
    options = _style(LIGHT) | {"savefig.facecolor": "white", "svg.hashsalt": MADE_BY, "pdf.fonttype": 42}
    return _saved(draw, options, format=form, metadata={"Creator": MADE_BY, **fixed})[0]


def _saved(draw: Draw, options: dict[str, Any], **form: Any) -> tuple[bytes, str]:
    with matplotlib.rc_context(options):  # type: ignore[arg-type]  # matplotlib types the keys as literals
        figure, buffer = Figure(figsize=(WIDTH, HEIGHT), layout="constrained"), io.BytesIO()
        words = draw(figure)
        figure.savefig(buffer, **form)
    return buffer.getvalue(), words


def quality(
    material: Material, task: str, looks: Mapping[str, Style], key: str = "value", across: Axis = SPARSITY
) -> Draw:
    """Draws quality, or the share of the span kept, against sparsity or cost: means, and the range over the seeds.

    Args:
        material: The material of the report.
        task: The experiment.
        looks: Styles of the methods, drawn in this order with the first on top.
        key: ``value`` or ``span_kept``.
        across: The horizontal axis.
    """
    is_span, metric = key == "span_kept", material.tasks[task]
    scale = 100 if is_span else 1
    drawn: dict[str, list[Setting]] = {}
    for setting in material.settings(task):
        if setting.values(key) and setting.values(across.key) and not setting.undefined:
            drawn.setdefault(setting.method, []).append(setting)

    def draw(figure: Figure) -> str:
        axes, handles, ink = figure.add_subplot(), [], matplotlib.rcParams["text.color"]
        references, descriptions = _references(material, task, key), []
        dense, floor = (float(np.mean(values)) if values else None for values in references)
        values = {method: [scale * value for s in mine for value in s.values(key)] for method, mine in drawn.items()}
        limits = None
        has_span = is_span or better(metric, dense or 0.0, floor or 0.0)
        if values and dense is not None and floor is not None and has_span:
            lte_values = values.get(next(iter(looks)), [])
            limits = _limits(
                [value for values_of_method in values.values() for value in values_of_method], lte_values, dense, floor
            )
        for i, method in enumerate(name for name in looks if name in drawn):
            mine, options = drawn[method], looks[method].options | {"zorder": 9 - i / 100}
            means = [(across.scale * fmean(s.values(across.key)), scale * fmean(s.values(key)), s) for s in mine]
            points = sorted(means, key=lambda point: point[:2])
            axes.plot([x for x, _, _ in points], [mean for _, mean, _ in points], **options)
            for x, _, setting in points:
                seeds = [scale * value for value in setting.values(key)]
                if len(seeds) > 1:
                    axes.vlines(x, min(seeds), max(seeds), color=options["color"], linewidth=1, alpha=0.7)
            outside = limits and not any(limits[0] <= mean <= limits[1] for _, mean, _ in points)
            label = mine[0].called + " (beyond the picture)" * bool(outside)
            handles.append(Line2D([], [], **options, label=label))
            descriptions.append(ends(mine[0].called, [point[:2] for point in points], across.unit))
        for reference, line, name in zip(references, ("--", ":"), ("dense", "floor"), strict=True):
            if reference:
                axes.axhline(fmean(reference), color=ink, linestyle=line, linewidth=1.2)
                axes.axhspan(min(reference), max(reference), color=ink, alpha=0.08, linewidth=0)
                descriptions.append(f"{name} {fmean(reference):.3g}")
        if limits:
            axes.set_ylim(*limits)
        _widen(axes, "y", 5.0 if is_span else 0.1 * abs(dense or 0.0) if is_unbounded(metric) else 0.05)
        _widen(axes, "x", across.least)
        if across is SPEED:
            axes.set_xlim(left=0)
        _name_references(axes, dense, floor)
        title = textwrap.fill(material.title(task).replace(" layer", "\N{NO-BREAK SPACE}layer"), TITLE_LETTERS)
        axes.set(
            xlabel=across.label, ylabel="dense-to-floor span kept (%)" if is_span else in_words(metric), title=title
        )
        axes.grid(visible=True)
        legend(figure, handles)
        return "; ".join(descriptions)

    return draw


def ends(name: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """Describes where a line begins and ends."""
    (first, start), (last, end) = points[0], points[-1]
    where = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in (first, last)]
    return f"{name} {start:.3g} at {where[0]}{unit}" + f" to {end:.3g} at {where[1]}{unit}" * (len(points) > 1)


def _widen(axes: Axes, which: str, least: float) -> None:
    """Widens an axis about its middle to at least this span, so that small differences do not look large."""
    low, high = getattr(axes, f"get_{which}lim")()
    if abs(high - low) < least:
        middle, half = (low + high) / 2, least / 2
        getattr(axes, f"set_{which}lim")(middle - half, middle + half)


def _references(material: Material, task: str, key: str) -> tuple[list[float], list[float]]:
    if key == "span_kept":
        return [100.0], [0.0]
    return material.reference(task, "dense"), material.reference(task, "floor")


def _limits(values: Sequence[float], lte_values: Sequence[float], dense: float, floor: float) -> tuple[float, float]:
    """Returns the limits of the vertical axis.

    A few settings far below the floor would compress the rest, so some settings other than LTE's (``own``) are left
    out. So is a floor far below all settings.
    """
    sign = 1 if floor < dense else -1
    high, top = sign * dense, max(sign * value for value in (*values, dense))
    all_but_few = min(
        [*(sign * value for value in lte_values), np.quantile([sign * value for value in values], HIDDEN)]
    )
    low = all_but_few
    if high - sign * floor <= FAR * (top - all_but_few):
        edge = sign * floor - BELOW * (high - sign * floor)
        low = max(min(sign * value for value in (*values, dense, floor)), min(edge, all_but_few))
    margin = 0.04 * (top - low)
    bottom, ceiling = sorted((sign * (low - margin), sign * (top + margin)))
    return bottom, ceiling


def _name_references(axes: Axes, dense: float | None, floor: float | None) -> None:
    low, high = axes.get_ylim()
    references = [(value, name) for value, name in ((dense, "dense"), (floor, "floor")) if value is not None]
    # a reference beyond the picture is named at the edge, with its value
    references = [
        (min(max(level, low), high), name if low <= level <= high else f"{name}\n{level:.3g}")
        for level, name in references
    ]
    right = axes.secondary_yaxis("right")
    right.set_yticks([value for value, _ in references], [name for _, name in references])
    right.tick_params(length=0)
    if len(references) == 2 and abs(references[0][0] - references[1][0]) < 0.07 * abs(high - low):
        upper = max(references)[1]
        for tick in right.get_yticklabels():
            tick.set_verticalalignment("bottom" if tick.get_text() == upper else "top")


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Puts the legend below the axes, in two columns, and makes the figure taller by its height."""
    labels = [textwrap.fill(str(handle.get_label()), LEGEND_LETTERS) for handle in handles]
    if not labels:
        return
    first = (len(labels) + 1) // 2
    lines = max(sum(label.count("\n") + 1 for label in half) for half in (labels[:first], labels[first:]))
    figure.set_figheight(figure.get_figheight() + LINE * lines + 0.15)
    space = {"columnspacing": 1.0, "handlelength": 2.2, "handletextpad": 0.4, "borderpad": 0.1, "labelspacing": 0.25}
    figure.legend(list(handles), labels, loc="outside lower center", ncols=2, frameon=False, **space)


def setting_label(setting: Setting) -> str:
    """Returns a setting's method and sparsity, its label in pictures of single settings."""
    # keep these together when a line is broken
    return f"{setting.called}, {100 * setting.sparsity:.0f}\N{NO-BREAK SPACE}%"


def curve(points: Sequence[Mapping[str, Any]], heading: str) -> Draw:
    """Draws the quality of one calibrated model against its measured tokens per second.

    Args:
        points: Points of ``lte curve``: the dense model, the trained threshold, and the requested sparsities.
        heading: The picture's title.
    """
    metric = metric_of(points[0])

    def draw(figure: Figure) -> str:
        axes, descriptions = figure.add_subplot(), []
        line = sorted((row for row in points if row["setting"] != "dense"), key=lambda point: point["sparsity"])
        for mine, style, label in (
            (line, STRONG, "sparse"),
            ([row for row in points if row not in line], DENSE, "dense"),
        ):
            places = [(row["tokens_per_second"], row[metric]) for row in mine]
            if places:
                axes.plot(*zip(*places, strict=True), **style.options, label=label)
                shares = [f"{100 * row['sparsity']:.0f}\N{NO-BREAK SPACE}%" for row in mine]
                for share, at in list(zip(shares, places, strict=True)) * (label == "sparse"):
                    axes.annotate(share, at, (7, 3), textcoords="offset points")
                descriptions += [
                    f"{label}, {share}: {score:.3g} at {rate:.0f} tokens/s"
                    for share, (rate, score) in zip(shares, places, strict=True)
                ]
        axes.set(xlabel=SPEED.label, ylabel=in_words(metric), xlim=(0, 1.1 * axes.get_xlim()[1]))
        axes.margins(y=0.15)
        _widen(axes, "y", 0.1 * abs(points[0][metric]) if is_unbounded(metric) else 0.05)
        axes.set_title(textwrap.fill(heading, TITLE_LETTERS), fontsize=LETTERS)
        axes.grid(visible=True)
        legend(figure, list(axes.lines))
        return "; ".join(descriptions)

    return draw

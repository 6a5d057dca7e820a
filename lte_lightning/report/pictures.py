"""The pictures of a report, each in a light and a dark version."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lte_lightning.report.collect import Material, Setting

LIGHT = {"ink": "#1a1a1a", "paper": "#ffffff", "grid": "#d8d8d8"}
DARK = {"ink": "#e6e6e6", "paper": "#1b1d21", "grid": "#3c4048"}
# Okabe and Ito's, which the colour-blind can tell apart; the first is LTE's if LTE comes first
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c", "#b8a800")
MARKERS = "osD^vP*X<>"
WIDTH = 5.2  # inches: on a phone the letters are still as large as the text


def _style(theme: dict[str, str]) -> dict[str, Any]:
    ink = {key: theme["ink"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    paper = {key: theme["paper"] for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")}
    paper |= {"legend.facecolor": theme["paper"]}
    lines = {"axes.edgecolor": theme["ink"], "grid.color": theme["grid"], "legend.edgecolor": theme["grid"]}
    return ink | paper | lines | {"font.size": 11, "axes.axisbelow": True, "svg.hashsalt": "lte"}


def render(draw: Callable[[Figure], None], height: float = 3.6) -> tuple[bytes, bytes]:
    """Returns a picture as two PNGs, for light and for dark pages."""
    found = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(_style(theme)):
            figure, buffer = Figure(figsize=(WIDTH, height), layout="constrained"), io.BytesIO()
            draw(figure)
            figure.savefig(buffer, dpi=150, metadata={"Software": None})
            found.append(buffer.getvalue())
    return found[0], found[1]


def quality(material: Material, task: str, key: str = "value") -> Callable[[Figure], None]:
    """Draws quality (or the share of the span kept) against sparsity: means, and from least to most over the seeds."""
    settings, scale = material.settings(task), 100 if key == "span_kept" else 1

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, method in enumerate(dict.fromkeys(setting.method for setting in settings)):
            mine = [setting for setting in settings if setting.method == method and setting.values(key)]
            if not mine:
                continue
            means = np.array([scale * setting.mean(key) for setting in mine])
            xs = np.array([100 * setting.sparsity for setting in mine])
            low, high = ([scale * pick(setting.values(key)) for setting in mine] for pick in (min, max))
            # a mean's rounding may lie beyond its only value
            spread = np.maximum([means - low, high - means], 0)
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
            axes.errorbar(xs, means, spread, capsize=3, elinewidth=1, label=method, **style)
        if key == "value":
            _line(axes, material.reference(task, "dense"), "dense", "--")
            _line(axes, material.reference(task, "floor"), "floor", ":")
        else:
            axes.axhline(100, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
        label = material.tasks[task] if key == "value" else "dense-to-floor span kept (%)"
        axes.set(xlabel="FFN neurons not run (%)", ylabel=label, title=task, xlim=(-3, 103))
        axes.grid(visible=True)
        axes.legend(fontsize=9)

    return draw


def _line(axes: Axes, values: Sequence[float], label: str, style: str) -> None:
    if values:
        ink = matplotlib.rcParams["text.color"]
        axes.axhline(np.mean(values), color=ink, linestyle=style, linewidth=1, label=label)
        axes.axhspan(min(values), max(values), color=ink, alpha=0.08, linewidth=0)


def layers(settings: Sequence[Setting]) -> Callable[[Figure], None]:
    """Draws the sparsity of each layer (the paper's figure 16), a row for each setting, means over the seeds."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = [np.mean([run.results["sparsity_per_layer"] for run in setting.runs], axis=0) for setting in settings]
        width = max(map(len, rows))
        grid = np.full((len(rows), width), np.nan)
        for i, row in enumerate(rows):
            grid[i, : len(row)] = 100 * row
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        names = [f"{setting.method}, {100 * setting.sparsity:.0f} %" for setting in settings]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.set(xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, label="FFN neurons not run (%)")

    return draw


def scores(settings: Sequence[Setting], threshold: float = 0.5) -> Callable[[Figure], None]:
    """Draws how scores are distributed (the paper's figure 3), over all layers and seeds."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, setting in enumerate(settings):
            counts = np.sum([np.sum(run.histogram, axis=0) for run in setting.runs if run.histogram], axis=0)
            shares = 100 * counts / counts.sum()
            edges = np.linspace(0, 1, len(counts) + 1)
            label = f"{setting.method}, {100 * setting.sparsity:.0f} %"
            axes.stairs(np.maximum(shares, 1e-3), edges, color=COLOURS[i % len(COLOURS)], label=label, linewidth=1.5)
        axes.axvline(threshold, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
        axes.set(xlabel="score (dashed: threshold)", ylabel="share of scores (%)", yscale="log", xlim=(0, 1))
        axes.legend(fontsize=9)

    return draw


def union(settings: Sequence[Setting]) -> Callable[[Figure], None]:
    """Draws the share of experts that no token of a batch needs, against its rows (the paper's figure 15)."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, setting in enumerate(settings):
            found = [run.results["union_sparsity"] for run in setting.runs if run.results.get("union_sparsity")]
            sizes = sorted({int(size) for one in found for size in one})
            means = [100 * np.mean([one[str(size)] for one in found if str(size) in one]) for size in sizes]
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(sizes, means, label=f"{setting.method}, {100 * setting.sparsity:.0f} %", **style)
        axes.set(xlabel="rows of a batch", ylabel="experts that no token needs (%)", xscale="log", ylim=(0, 100))
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(visible=True)
        axes.legend(fontsize=9)

    return draw


def latency(rows: Sequence[dict[str, Any]]) -> Callable[[Figure], None]:
    """Draws how many times faster than dense each backend is, against sparsity, and the bound that memory sets."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        backends = list(dict.fromkeys((row["backend"], row.get("dtype", "")) for row in rows))
        for i, backend in enumerate(backends):
            mine = sorted(
                (row["sparsity"], row["ratio"])
                for row in rows
                if (row["backend"], row.get("dtype", "")) == backend and row["ratio"] is not None
            )
            if mine:
                style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
                axes.plot(*np.array([(100 * x, y) for x, y in mine]).T, label=" ".join(filter(None, backend)), **style)
        ink = matplotlib.rcParams["text.color"]
        bounds = sorted({(row["sparsity"], row["bound"]) for row in rows if row["bound"] is not None})
        if bounds:
            axes.plot(*np.array([(100 * x, y) for x, y in bounds]).T, ":", color=ink, label="bound", linewidth=1)
        axes.axhline(1, color=ink, linestyle="--", linewidth=1)
        first = rows[0]
        title = f"{first['shape']}, {first['scope']}, {first['phase']}, {first['tokens']:.0f} tokens"
        axes.set(xlabel="sparsity (%)", ylabel="times as fast as dense", title=title, ylim=(0, None))
        axes.grid(visible=True)
        axes.legend(fontsize=9)

    return draw

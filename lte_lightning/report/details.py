"""The detailed pictures: layers, scores, batches, and measured time."""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lte_lightning.report.bench import title
from lte_lightning.report.methods import describe
from lte_lightning.report.names import counted
from lte_lightning.report.pictures import LETTERS, LINE, NAME_LETTERS, TITLE_LETTERS, Draw, ends, legend, setting_label
from lte_lightning.report.run import Run, Setting
from lte_lightning.report.style import KNOWN, Style

THIRDS = (15, 35)  # of the 50 bins of a histogram: below 0.3, and from 0.7


def layers(settings: Sequence[Setting]) -> Draw:
    """Draws the sparsity of each layer (the paper's figure 16), a row for each setting."""

    def draw(figure: Figure) -> str:
        names = [textwrap.fill(setting_label(setting), NAME_LETTERS) for setting in settings]
        figure.set_figheight(1.2 + sum(0.1 + LINE * (name.count("\n") + 1) for name in names))
        axes = figure.add_subplot()
        grid = [100 * np.mean(setting.values("sparsity_per_layer"), axis=0) for setting in settings]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, label="FFN sparsity (%)", orientation="horizontal", fraction=0.35 / len(names))
        rows = zip(settings, grid, strict=True)
        return "; ".join(f"{setting_label(s)}: {', '.join(f'{share:.0f}' for share in shares)} %" for s, shares in rows)

    return draw


def scores(settings: Sequence[Setting], looks: Mapping[str, Style]) -> Draw:
    """Draws the distribution of scores over all layers and seeds (the paper's figure 3); thresholds are dashed."""

    def draw(figure: Figure) -> str:
        axes, handles, least, descriptions = figure.add_subplot(), [], 0.1, []
        for setting in settings:
            counts = np.sum([np.sum(run.histogram, axis=0) for run in setting.runs if run.histogram], axis=0)
            shares = np.where(counts > 0, 100 * counts / counts.sum(), np.nan)
            least = min(least, np.nanmin(shares))
            options = looks[setting.method].options | {"marker": ""}
            line = {key: options[key] for key in ("color", "linestyle", "linewidth")}
            axes.stairs(shares, np.linspace(0, 1, len(counts) + 1), baseline=None, **line)
            handles.append(Line2D([], [], **options, label=setting_label(setting)))
            low, middle, high = (100 * part.sum() / counts.sum() for part in np.split(counts, THIRDS))
            descriptions.append(
                f"{setting_label(setting)}: {low:.0f} % below 0.3, {middle:.0f} % from there to 0.7, {high:.0f} % above"
            )
        for threshold in sorted(
            {run.lte["threshold"] for shown in settings for run in shown.runs if has_threshold(run)}
        ):
            axes.axvline(threshold, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
        axes.set(xlabel="score", ylabel="share of scores (%)", yscale="log", xlim=(0, 1), ylim=(least / 1.5, 150))
        # the exponent of 10^-2 would be too small to read
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        legend(figure, handles)
        return "; ".join(descriptions)

    return draw


def has_threshold(run: Run) -> bool:
    """Whether the run chose experts by a threshold on their scores."""
    description = describe(run.lte)
    return description.graded and not description.scales and "threshold" in run.lte


def near_threshold(setting: Setting, reach: float = 0.1) -> float | None:
    """Returns the percentage of a setting's scores within ``reach`` of the threshold; None without a threshold."""
    runs = [run for run in setting.runs if run.histogram and has_threshold(run)]
    if not runs:
        return None
    counts, near = np.sum([np.sum(run.histogram, axis=0) for run in runs], axis=0), runs[0].lte["threshold"]
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    return float(100 * counts[np.abs(middles - near) < reach].sum() / counts.sum())


def union(settings: Sequence[Setting], looks: Mapping[str, Style]) -> Draw:
    """Draws the share of experts that no token of a batch needs, against its rows (the paper's figure 15)."""

    def draw(figure: Figure) -> str:
        axes, handles, ticks, descriptions = figure.add_subplot(), [], set(), []
        for setting in settings:
            per_run = setting.values("union_sparsity")
            sizes = sorted({int(size) for by_rows in per_run for size in by_rows})
            means = [
                100 * np.mean([by_rows[str(size)] for by_rows in per_run if str(size) in by_rows]) for size in sizes
            ]
            options = looks[setting.method].options
            axes.plot(sizes, means, **options)
            handles.append(Line2D([], [], **options, label=setting_label(setting)))
            ticks |= set(sizes)
            ends_of = dict([(sizes[0], means[0]), (sizes[-1], means[-1])])
            shares = (f"{mean:.0f} % for {counted(size, 'row')}" for size, mean in ends_of.items())
            descriptions.append(f"{setting_label(setting)}: {', '.join(shares)}")
        axes.set(xlabel="rows of a batch", ylabel="experts that no token needs (%)", xscale="log", ylim=(0, 100))
        axes.set_xticks(sorted(ticks), [str(size) for size in sorted(ticks)])
        axes.minorticks_off()
        axes.grid(visible=True)
        legend(figure, handles)
        return "; ".join(descriptions)

    return draw


def latency(rows: Sequence[dict[str, Any]], several_files: bool = False) -> Draw:
    """Draws each backend's speed-up over dense against sparsity, and the bound that memory sets.

    Args:
        rows: A group of `bench.groups`.
        several_files: Whether the title names the file.
    """

    def means(key: str, backend: str | None = None) -> tuple[list[float], list[float]]:
        mine = [row for row in rows if backend in (None, row["backend"])]
        at = sorted({row["sparsity"] for row in mine})
        return [100 * share for share in at], [
            fmean(row[key] for row in mine if row["sparsity"] == share) for share in at
        ]

    def draw(figure: Figure) -> str:
        axes, ink = figure.add_subplot(), matplotlib.rcParams["text.color"]
        looks, drawn = list(KNOWN.values()), {}
        for i, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            drawn[backend] = means("ratio", backend)
            axes.plot(*drawn[backend], **looks[i % len(looks)].options, label=backend)
        drawn["bound"] = means("bound")
        axes.plot(*drawn["bound"], ":", color=ink, label="bound", linewidth=1.2)
        handles = list(axes.lines)
        axes.axhline(1, color=ink, linestyle="--", linewidth=1)
        heading = textwrap.fill(title(rows, several_files), TITLE_LETTERS)
        axes.set(xlabel="sparsity (%)", ylabel="times as fast as dense", ylim=(0, None))
        axes.set_title(heading, fontsize=LETTERS)
        axes.grid(visible=True)
        legend(figure, handles)
        return "; ".join(ends(name, list(zip(*points, strict=True)), " %") for name, points in drawn.items())

    return draw

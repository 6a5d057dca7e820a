"""The pictures: speed-up against sparsity, with the bound; and accuracy in long contexts."""

import math
from pathlib import Path

from lte_lightning.bench.context import CHANCE, Score
from lte_lightning.bench.output import counted
from lte_lightning.bench.timing_row import Timing
from lte_lightning.files import whole_file

COLUMNS = 4  # panels side by side; more are not legible


def draw(timings: list[Timing], path: Path) -> None:
    """Draws a panel for each scope, phase, type and number of tokens, and saves it."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str, int], list[Timing]] = {}
    for f in timings:
        groups.setdefault((f.scope, f.phase, f.dtype, f.tokens), []).append(f)
    columns, rows = min(COLUMNS, len(groups)), math.ceil(len(groups) / COLUMNS)
    picture = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    all_axes = picture.subplots(rows, columns, squeeze=False).flatten()
    for axes in all_axes[len(groups) :]:
        axes.remove()
    for axes, ((scope, phase, dtype, tokens), group) in zip(all_axes, groups.items(), strict=False):
        bounds = sorted({(f.sparsity, f.bound) for f in group})
        axes.plot(*zip(*bounds, strict=True), "k--", linewidth=1, label="bound")
        for backend in dict.fromkeys(f.backend for f in group):
            points = [(f.sparsity, f.ratio) for f in group if f.backend == backend]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=backend)
        axes.axhline(1.0, color="0.7", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel("sparsity")
        axes.set_title(f"{group[0].shape} {scope}, {phase}\n{dtype}, {counted(tokens, 'token')}", fontsize="medium")
        axes.legend(fontsize="small")
    for axes in all_axes[::columns]:
        axes.set_ylabel("times as fast as dense")
    with whole_file(path, "wb") as file:
        picture.savefig(file, dpi=120, format=path.suffix.lstrip(".") or "png")


def draw_context(scores: list[Score], path: Path) -> None:
    """Draws a panel for each task, accuracy over the context's length, a line for each setting, and saves it."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(score.task for score in scores))
    picture = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for setting in dict.fromkeys(score.setting for score in scores):
            group = [score for score in scores if (score.task, score.setting) == (task, setting)]
            places, heights = [score.tokens for score in group], [100 * score.accuracy for score in group]
            errors = [0.0 if math.isnan(score.error) else 100 * score.error for score in group]
            style = "k--" if setting == "dense" else "o-"
            axes.errorbar(places, heights, errors, fmt=style, linewidth=1, markersize=4, capsize=2, label=setting)
        if task in CHANCE:
            axes.axhline(100 * CHANCE[task], color="0.7", linewidth=1)
        axes.set_ylim(-4, 104)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("tokens of context")
    axes.legend(fontsize="small", title="FFN sparsity")
    picture.axes[0].set_ylabel("answers ranked first, %")
    with whole_file(path, "wb") as file:
        picture.savefig(file, dpi=120, format=path.suffix.lstrip(".") or "png")

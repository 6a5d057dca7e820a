"""The picture: speed-up against sparsity, with the bound."""

import math
from pathlib import Path

from lte_lightning.bench.measure import Figure
from lte_lightning.bench.output import counted
from lte_lightning.files import whole_file

COLUMNS = 4  # panels side by side; more are not legible


def draw(figures: list[Figure], path: Path) -> None:
    """Draws a panel for each scope, phase, type and number of tokens, and saves it."""
    from matplotlib.figure import Figure as Picture

    groups: dict[tuple[str, str, str, int], list[Figure]] = {}
    for f in figures:
        groups.setdefault((f.scope, f.phase, f.dtype, f.tokens), []).append(f)
    columns, rows = min(COLUMNS, len(groups)), math.ceil(len(groups) / COLUMNS)
    picture = Picture(figsize=(4 * columns, 3.6 * rows), layout="constrained")
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

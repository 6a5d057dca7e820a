"""The picture: speed-up against sparsity, with the bound."""

from pathlib import Path

from lte_lightning.bench.measure import Figure


def draw(figures: list[Figure], path: Path) -> None:
    """Draws a panel for each scope, phase, type and number of tokens, and saves it."""
    from matplotlib.figure import Figure as Picture

    groups: dict[tuple[str, str, str, int], list[Figure]] = {}
    for f in figures:
        groups.setdefault((f.scope, f.phase, f.dtype, f.tokens), []).append(f)
    picture = Picture(figsize=(4 * len(groups), 3.6), layout="constrained")
    all_axes = picture.subplots(1, len(groups), squeeze=False)[0]
    for axes, ((scope, phase, dtype, tokens), group) in zip(all_axes, groups.items(), strict=True):
        bounds = sorted({(f.sparsity, f.bound) for f in group})
        axes.plot(*zip(*bounds, strict=True), "k--", linewidth=1, label="bound")
        for backend in dict.fromkeys(f.backend for f in group):
            points = [(f.sparsity, f.ratio) for f in group if f.backend == backend]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=backend)
        axes.axhline(1.0, color="0.7", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel("sparsity")
        axes.set_title(f"{group[0].shape} {scope}, {phase}\n{dtype}, {tokens} tokens", fontsize="medium")
        axes.legend(fontsize="small")
    all_axes[0].set_ylabel("times as fast as dense")
    picture.savefig(path, dpi=120)

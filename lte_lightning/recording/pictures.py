"""Pictures of a model's selection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lte_lightning.files import whole_file


def draw_views(view: dict[str, Any], threshold: float, folder: Path) -> list[Path]:
    """Draws a view's measurements, and returns the pictures' files."""
    sparsity, scores = folder / "sparsity_per_layer.png", folder / "scores.png"
    draw_sparsity(view["sparsity_per_layer"], sparsity)
    draw_scores(view["score_histogram"], threshold, scores)
    return [sparsity, scores]


def draw_sparsity(sparsity_per_layer: Sequence[float], path: Path) -> None:
    """Draws each layer's sparsity as a bar."""
    figure, axes = _plot(3.2)
    layers = range(len(sparsity_per_layer))
    bars = axes.bar(layers, [100 * s for s in sparsity_per_layer], color="#31688e")
    if len(sparsity_per_layer) <= 16:
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(xlabel="layer", ylabel="FFN neurons not run (%)", ylim=(0, 105), title="Sparsity per layer")
    axes.set_xticks(layers, [str(i) for i in layers] if len(sparsity_per_layer) <= 32 else None)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")


def draw_scores(histogram: Sequence[Sequence[int]], threshold: float, path: Path) -> None:
    """Draws the distribution of each layer's router scores as in the paper's figure 3, one row per layer."""
    counts_LH = np.asarray(histogram, dtype=float)
    shares_LH = counts_LH / np.maximum(counts_LH.sum(1, keepdims=True), 1)
    figure, axes = _plot(1.6 + 0.22 * len(counts_LH), right=1.0)
    image = axes.imshow(
        np.log10(np.maximum(shares_LH, 1e-5)),
        aspect="auto",
        extent=(0, 1, len(counts_LH) - 0.5, -0.5),
        cmap="viridis",
        interpolation="nearest",
    )
    axes.axvline(threshold, color="white", linestyle="--", linewidth=1)
    axes.set(xlabel="router score (dashed: threshold)", ylabel="layer", title="Scores per layer")
    bar = axes.inset_axes((1.03, 0, 0.03, 1))
    figure.colorbar(image, cax=bar, label="log10 share of scores")
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")


def _plot(height: float, right: float = 0.1) -> tuple[Figure, Axes]:
    """Returns a figure of that height and right margin in inches; a layout engine would draw everything twice."""
    width, left, bottom, top = 6.0, 0.65, 0.5, 0.35
    figure = Figure(figsize=(width, height))
    place = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return figure, figure.add_axes(place)

"""Pictures of a model's selection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
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
    figure = Figure(figsize=(6, 1.6 + 0.22 * len(counts_LH)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        np.log10(np.maximum(shares_LH, 1e-5)),
        aspect="auto",
        extent=(0, 1, len(counts_LH) - 0.5, -0.5),
        cmap="viridis",
        interpolation="nearest",
    )
    axes.axvline(threshold, color="white", linestyle="--", linewidth=1)
    axes.set(xlabel="router score (dashed: threshold)", ylabel="layer", title="Scores per layer")
    figure.colorbar(image, label="log10 share of scores")
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")

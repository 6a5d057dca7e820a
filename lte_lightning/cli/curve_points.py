"""The measurements and the picture of ``lte curve``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.bench.machine import clock_on
from lte_lightning.bench.measure import Timer, interleave, timed
from lte_lightning.cli.rows import Rows
from lte_lightning.core.accounting.cost import GFLOP
from lte_lightning.core.model.convert import restore
from lte_lightning.core.model.experts import set_mode
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.core.model.thresholds import set_sparsity
from lte_lightning.files import whole_file
from lte_lightning.recording.latency import ROUNDS, decode, forward, row_batches, run_dtype, tokens_of

DENSE, TRAINED = "dense", "trained"


@torch.no_grad()
def qualities(rows: Rows, sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """Returns a point for the dense model, one at the trained threshold, and one for each sparsity.

    A point has its ``setting``, the ``sparsity`` on the validation rows, the task's metric under its own name, and
    ``gflops_per_token``.
    """
    module, points = rows.module, []
    for setting in (DENSE, TRAINED, *sparsities):
        set_mode(module.net, "hard")
        set_sparsity(module.net, setting if isinstance(setting, float) else None)
        view = "dense" if setting == DENSE else "hard"
        for batch, number in rows.validation():
            with rows.computing():
                module.measure(view, batch, number)
        measured = module.read_meters(view)
        cost = module.cost(measured.get("sparsity_per_layer"))
        points.append(
            {
                "setting": setting,
                "sparsity": measured.get("sparsity", 0.0),
                module.metric_name: measured[module.metric_name],
                "gflops_per_token": cost["flops_per_token"] / GFLOP,
            }
        )
    return points


def speeds(rows: Rows, sparsities: Sequence[float], size: int) -> dict[Any, float]:
    """Returns the tokens per second of each setting of `qualities`: medians over rounds, in which all take turns.

    Args:
        rows: The model's folder and rows.
        sparsities: The settings to time, beside the dense model and the trained threshold.
        size: Rows of a call: a decoding step of a language model, else a forward pass.
    """
    device, dtype = rows.module.net.device, run_dtype(rows.precision)
    loaders: Any = rows.data.val_dataloader()
    batches = row_batches(loaders[0] if isinstance(loaders, list) else loaders, size, device)
    sparse = from_pretrained(rows.folder, dtype=dtype)
    # with its own weights: the sparse model's are laid out for its kernels
    dense = restore(from_pretrained(rows.folder, dtype=dtype, backend="dense-mask"))
    for model in (sparse, dense):
        nn.Module.to(model, device)  # the decorator of transformers hides its types
        model.eval().requires_grad_(False)
    decodes = sparse.can_generate() and not sparse.config.is_encoder_decoder
    run = decode if decodes else forward
    tokens = tokens_of(batches, size, decodes)
    timer: Timer = partial(timed, clock=clock_on(device))

    def at(model: PreTrainedModel, sparsity: float | None) -> list[float]:
        if model is sparse:
            set_sparsity(model, sparsity)
        return run(model, batches, timer)

    arms: dict[Any, Any] = {DENSE: partial(at, dense, None), TRAINED: partial(at, sparse, None)}
    arms |= {sparsity: partial(at, sparse, sparsity) for sparsity in sparsities}
    with torch.inference_mode():
        return {setting: 1000.0 * tokens / median(ms) for setting, ms in interleave(arms, ROUNDS).items()}


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws each value over the sparsity: the dense model is a line, the trained threshold a star."""
    from matplotlib.figure import Figure

    names = [name for name in points[0] if name not in ("setting", "sparsity")]
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    curve = sorted((point for point in points if point["setting"] != DENSE), key=lambda point: point["sparsity"])
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([100 * p["sparsity"] for p in curve], [p[name] for p in curve], "o-", color="#31688e", markersize=4)
        for point in points:
            if point["setting"] == DENSE:
                axes.axhline(point[name], color="0.6", linewidth=1, linestyle="--", label="dense")
            elif point["setting"] == TRAINED:
                axes.plot(100 * point["sparsity"], point[name], "*", color="#d1495b", markersize=11, label="as trained")
        axes.set(xlabel="FFN neurons not run (%)", title=name.replace("_", " "))
        if name != names[0]:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format=path.suffix.lstrip("."))

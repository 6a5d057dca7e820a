"""Latency of a fit's model against its dense twin, on validation rows."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lte_lightning.bench.machine import clock_on, moved
from lte_lightning.bench.measure import Timer, interleave, timed
from lte_lightning.core.model.convert import restore
from lte_lightning.core.model.experts import set_mode
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.trainer import declared

BATCHES = 8  # batches in each round
STEPS = 8  # tokens that each batch decodes
ROUNDS = 7
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def measure_latency(folder: Path, trainer: Trainer, rows: int, backend: Backend) -> dict[str, Any]:
    """Times a saved model and its dense twin in turns, on the trainer's device and in its precision's type.

    Both work as in use: real routers on real validation rows, with padding. A call is one forward pass. For a decoder
    that generates, a call decodes the next token of each row with a cache.

    Args:
        folder: Where `save_pretrained` wrote the model. It is loaded twice.
        trainer: The trainer whose data module has the rows.
        rows: Rows per call.
        backend: The backend that computes the selected experts.

    Returns:
        ``latency_ms`` and ``dense_latency_ms`` of a call: medians over rounds of the mean over batches; ``speedup``,
        dense over sparse; and ``latency_of``, a description of the measurement and the machine.
    """
    device, dtype = trainer.strategy.root_device, run_dtype(str(trainer.precision))
    sparse = from_pretrained(folder, dtype=dtype, backend=backend)
    set_mode(sparse, "hard")
    # with its own weights, or one would profit from cached weights of the other
    dense = restore(from_pretrained(folder, dtype=dtype, backend="dense-mask"))
    decodes = sparse.can_generate() and not sparse.config.is_encoder_decoder
    loaders = declared(trainer).datamodule.val_dataloader()
    batches = row_batches(loaders[0] if isinstance(loaders, list) else loaders, rows, device)
    run = decode if decodes else forward
    timer: Timer = partial(timed, clock=clock_on(device))
    models = {"dense": dense, "sparse": sparse}
    with torch.inference_mode():
        arms: dict[str, Callable[[], Sequence[float]]] = {
            name: partial(run, moved(model, device).eval().requires_grad_(False), batches, timer)
            for name, model in models.items()
        }
        samples = interleave(arms, ROUNDS)
    ms = {name: median(times) for name, times in samples.items()}
    return {
        "latency_ms": ms["sparse"],
        "dense_latency_ms": ms["dense"],
        "speedup": ms["dense"] / ms["sparse"],
        "latency_of": {
            "call": "decoding step" if decodes else "forward pass",
            "rows": rows,
            "tokens": tokens_of(batches, rows, decodes),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
        },
    }


def tokens_of(batches: Sequence[dict[str, torch.Tensor]], rows: int, decodes: bool) -> float:
    """Returns how many real tokens a call computes on average; a decoding step computes one for each row."""
    return float(rows) if decodes else fmean(float(batch["attention_mask"].sum()) for batch in batches)


def run_dtype(precision: str) -> torch.dtype:
    """Returns the type in which a model runs after training in a precision."""
    # after training in mixed precision, most users run the model in the low type
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def row_batches(loader: Any, rows: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Returns the first batches of a loader's rows in an order drawn once, with ``rows`` rows each."""
    drawn = DataLoader(
        loader.dataset,
        batch_size=min(rows, len(loader.dataset)),
        shuffle=True,
        drop_last=True,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(0),
    )
    first = [batch for batch, _ in zip(drawn, range(BATCHES), strict=False)]
    return [{key: batch[key].to(device) for key in INPUTS if key in batch} for batch in first]


def forward(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], timer: Timer) -> list[float]:
    """Returns the mean milliseconds of a forward pass."""
    return [fmean(timer([partial(model, **batch) for batch in batches]))]


def decode(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], timer: Timer) -> list[float]:
    """Returns the mean milliseconds of a step that decodes each row's next token with a cache."""
    times = []
    for batch in batches:
        length = int(batch["attention_mask"].sum(1).min())
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ids_BT = torch.stack([ids_T[real_T][:length] for ids_T, real_T in pairs])
        steps = max(1, min(STEPS, length // 2))
        cache = model(ids_BT[:, : max(1, length - steps)], use_cache=True).past_key_values
        times += timer([_step(model, ids_BT[:, -i, None], cache) for i in range(steps, 0, -1)])
    return [fmean(times)]


def _step(model: PreTrainedModel, ids_B1: torch.Tensor, cache: Any) -> Callable[[], object]:
    return lambda: model(ids_B1, past_key_values=cache, use_cache=True)

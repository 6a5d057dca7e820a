"""What an engine receives, and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte_lightning.bench.decoding import Arm

Logits = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """The same work for every engine: model, inputs, threads and number of tokens.

    Args:
        model: The plain dense model with its head, in float32.
        tokenizer: The model's tokenizer, or None.
        batch: Inputs [B, T]: a prompt to continue, or a batch for one forward pass.
        new_tokens: Tokens to decode after the prompt; None for one forward pass.
        threads: Number of threads, the same as torch's.
        calibration: Batches for the scales of activations, for engines with static quantisation.
        folder: Where an engine may keep its files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    batch: Mapping[str, torch.Tensor]
    new_tokens: int | None
    threads: int
    calibration: Sequence[Mapping[str, torch.Tensor]]
    folder: Path


@dataclass(frozen=True)
class Started:
    """An engine that has loaded the model.

    Args:
        arm: Runs one pass and returns its tokens per second.
        logits: Computes the logits of a batch; None if the engine cannot return logits.
        model: Makes a torch model with the same weights, for an engine that cannot return logits.
    """

    arm: Arm
    logits: Logits | None = None
    model: Callable[[], PreTrainedModel] | None = None


def inputs_of(job: Job) -> dict[str, Any]:
    """Returns the batch as NumPy arrays."""
    return {name: value.numpy() for name, value in job.batch.items()}

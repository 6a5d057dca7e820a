"""What an engine is given, and what it gives back."""

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
    """What every engine is to do: the same model, inputs, threads and tokens.

    Args:
        model: The dense model with its head, plain, in float32.
        tokenizer: Its own, None if there is none.
        batch: Inputs [B, T]: a prompt that is decoded behind, or a batch of one forward pass.
        new_tokens: Tokens to decode behind the prompt; None for one forward pass.
        threads: As many as torch has.
        calibration: Batches by which activations are given their scales, where they are rounded beforehand.
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
    """An engine that has the model.

    Args:
        arm: Makes one pass and returns its tokens per second.
        logits: Of a batch; None where the engine gives none.
        model: Makes a model of torch whose function the engine computes, where it gives no logits itself.
    """

    arm: Arm
    logits: Logits | None = None
    model: Callable[[], PreTrainedModel] | None = None


def inputs_of(job: Job) -> dict[str, Any]:
    """Returns the batch as NumPy arrays."""
    return {name: value.numpy() for name, value in job.batch.items()}

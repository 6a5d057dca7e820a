"""Batches of prompts and answers: padded right for training, left for generation."""

from collections.abc import Sequence
from typing import Any

import torch

from lte_lightning.core.model.head import IGNORED


class PadsRight:
    """Pads on the right, to a multiple of 8; a subclass adds the labels, which padding does not carry.

    Args:
        pad_id: The pad token.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def padded(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Returns input_ids and attention_mask, [B, T]."""
        return pad_prompts(ids, self.pad_id, "right")


class CollateAnswers(PadsRight):
    """Makes a batch of prompts with their answers, for the loss."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels, all [B, T] (labels [B, T'] for an encoder-decoder)."""
        batch = self.padded([row["input_ids"] for row in rows])
        return batch | {"labels": _pad([row["labels"] for row in rows], IGNORED, "right")}


class CollatePrompts:
    """Makes a batch to generate from.

    Args:
        pad_id: The pad token.
        side: Where to pad.
    """

    def __init__(self, pad_id: int, side: str) -> None:
        self.pad_id = pad_id
        self.side = side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns input_ids and attention_mask [B, T], and lists of rows, prompts and references."""
        batch = pad_prompts([row["input_ids"] for row in rows], self.pad_id, self.side)
        return batch | {key: [row[key] for row in rows] for key in ("row", "prompt", "references")}


def pad_prompts(ids: Sequence[Sequence[int]], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """Returns input_ids and attention_mask, [B, T]; the mask goes by position, so real pad tokens stay real."""
    mask_BT = _pad([[1] * len(row) for row in ids], 0, side)
    return {"input_ids": _pad(ids, pad_id, side), "attention_mask": mask_BT}


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    width = -(-max(map(len, rows)) // 8) * 8
    padded_BT = torch.full((len(rows), width), value)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        padded_BT[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return padded_BT

"""Blocks of running text: packed from the tokens of many rows, and made into batches."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from lte_lightning.core.model.head import IGNORED
from lte_lightning.data.padding import PadsRight


class PackedBlocks(TorchDataset[dict[str, Any]]):
    """Blocks of a stream of tokens; each block begins with the last token of the block before.

    Args:
        rows: With columns `ids` and `words`, lists of each row's tokens and of the words that begin in them.
        size: Tokens per block.
        end: The token after the last row.
    """

    def __init__(self, rows: Dataset, size: int, end: int) -> None:
        self.size = size
        # Views of the file that `datasets` has mapped into memory: nothing is read before it is needed.
        self._ids, self._words = (_flat(rows, name) for name in ("ids", "words"))
        self._ids.append(np.array([end], dtype=np.int32))
        self._words.append(np.array([0], dtype=np.int8))
        self._starts = np.cumsum([0, *map(len, self._ids)])
        self.tokens = int(self._starts[-1])

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // (self.size - 1))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every block."""
        lengths = np.full(len(self), self.size)
        lengths[-1] = self.tokens - (len(self) - 1) * (self.size - 1)
        return lengths

    def __getitem__(self, block: int) -> dict[str, Any]:
        """Returns a block's tokens, and how many words begin in them, the first token aside."""
        first = block * (self.size - 1)
        last = min(first + self.size, self.tokens)
        words = self._cut(self._words, first + 1, last).sum(dtype=np.int64)
        return {"input_ids": self._cut(self._ids, first, last), "words": int(words)}

    def _cut(self, parts: list[np.ndarray], first: int, last: int) -> np.ndarray:
        index = int(np.searchsorted(self._starts, first, side="right")) - 1
        pieces = []
        while first < last:
            part = parts[index][first - self._starts[index] : last - self._starts[index]]
            pieces.append(part)
            first, index = first + len(part), index + 1
        return np.concatenate(pieces)


def _flat(rows: Dataset, name: str) -> list[np.ndarray]:
    # `flatten`, not `values`: a chunk may be a slice of a longer list
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in rows.data.column(name).chunks]


class CollateBlocks(PadsRight):
    """Makes a batch of blocks: every token is predicted from those before it."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels [B, T], and words [B]."""
        batch = self.padded([row["input_ids"].tolist() for row in rows])
        labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return batch | {"labels": labels_BT, "words": torch.tensor([row["words"] for row in rows])}

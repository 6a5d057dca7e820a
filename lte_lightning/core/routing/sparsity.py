"""Sparsity, counted in one place: the share of (token, expert) pairs that do not run in hard mode."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Counts:
    """Counts of the experts that ran, over real tokens.

    All experts of a model have the same number of neurons, so shares of experts are shares of FFN neurons. If a
    selector reports the share of the weights that a token uses, pairs count by that share.

    Args:
        active_L: (token, expert) pairs that ran in each layer, int64.
        tokens_L: Tokens that each layer has seen, int64; an encoder and a decoder see different numbers.
        experts: Number of experts of each layer.
    """

    active_L: torch.Tensor
    tokens_L: torch.Tensor
    experts: Sequence[int]

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.active_L + other.active_L, self.tokens_L + other.tokens_L, self.experts)

    @property
    def pairs(self) -> list[int]:
        """Number of (token, expert) pairs of each layer."""
        return [int(tokens) * experts for tokens, experts in zip(self.tokens_L, self.experts, strict=True)]

    def sparsity(self) -> float:
        """Returns the share of FFN neurons (or weights) that did not run, over tokens and layers; 1 without tokens."""
        return 1.0 - int(self.active_L.sum()) / max(sum(self.pairs), 1)

    def per_layer(self) -> list[float]:
        """Returns the sparsity of each layer."""
        return [1.0 - int(active) / max(pairs, 1) for active, pairs in zip(self.active_L, self.pairs, strict=True)]

"""Reads a whole optimizer step ahead, because losses are means over all of its tokens."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch


class Loader(Protocol):
    """Yields batches, and may know their number."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class StepLoader:
    """Hands on a loader's batches, and reads ahead so that it knows how much each optimizer step holds.

    A step's batches wait in memory, on the CPU, until they are run. The last step of an epoch may have fewer.

    Args:
        loader: Yields the batches.
        amounts: Returns what a batch holds, a tensor of counts.
        accumulate: Batches in an optimizer step.
        epoch: Returns how many batches the epoch has.
    """

    def __init__(
        self,
        loader: Loader,
        amounts: Callable[[Any], torch.Tensor],
        accumulate: int,
        epoch: Callable[[], int],
    ) -> None:
        self.loader = loader
        self._amounts = amounts
        self._accumulate = accumulate
        self._epoch = epoch
        self._totals: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, where a copy is made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    # A generator, so that the epoch is asked at the first batch, as samplers do
    def __iter__(self) -> Iterator[Any]:
        self._totals.clear()
        batches, left, step = iter(self.loader), self._epoch(), 0
        while ahead := list(islice(batches, min(self._accumulate, left) if left > 0 else self._accumulate)):
            self._totals[step] = torch.stack([self._amounts(batch) for batch in ahead]).sum(0)
            left, step = left - len(ahead), step + 1
            yield from ahead

    def take(self, step: int) -> torch.Tensor:
        """Returns, and forgets, the amounts of an optimizer step of the epoch (from 0) on this device."""
        return self._totals.pop(step)

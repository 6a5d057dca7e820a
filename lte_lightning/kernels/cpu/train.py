"""The products of training with selected experts on the CPU (train.h): between tokens, pairs and weights.

Shapes: N tokens, E experts of S neurons, D width, P pairs of a token and an expert that it runs, ordered by expert and
then by token. Each function takes one or two weights or sets of numbers at a time, as an FFN has one or two halves.
"""

import ctypes
from collections.abc import Sequence

import torch

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import DTYPES


class Pairs:
    """The selected pairs of one batch.

    Args:
        mask_NE: True where a token runs an expert.
        neurons: S, of an expert.
        width: D.
    """

    def __init__(self, mask_NE: torch.Tensor, neurons: int, width: int) -> None:
        self.mask_NE, self.S, self.D = mask_NE.contiguous(), neurons, width
        self.counts_E = mask_NE.sum(dim=0)
        self.P = int(self.counts_E.sum())

    def from_rows(
        self, x_ND: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Returns each pair's products of the token's and the expert's rows, plus biases: [P, S] for each weight."""
        out = [x_ND.new_empty(self.P, self.S) for _ in weights]
        self._run(0, x_ND, weights, biases, out)
        return out

    def to_rows(self, numbers: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns [N, D]: each token's sum, over its pairs and over the weights, of numbers [P, S] times rows."""
        out_ND = numbers[0].new_empty(len(self.mask_NE), self.D)
        self._run(1, out_ND, weights, (), numbers)
        return out_ND

    def to_weights(self, numbers: Sequence[torch.Tensor], x_ND: torch.Tensor) -> list[torch.Tensor]:
        """Returns [E, S, D] for each set of numbers [P, S]: over an expert's pairs, numbers times the tokens' rows."""
        out = [x_ND.new_empty(self.mask_NE.shape[1], self.S, self.D) for _ in numbers]
        self._run(2, x_ND, out, (), numbers)
        return out

    def to_biases(self, numbers_PS: torch.Tensor) -> torch.Tensor:
        """Returns [E, S], the sums of numbers [P, S] over each expert's pairs, in float32."""
        experts_P = torch.repeat_interleave(self.counts_E)
        sums_ES = numbers_PS.new_zeros(self.mask_NE.shape[1], self.S, dtype=torch.float32)
        return sums_ES.index_add_(0, experts_P, numbers_PS.float())

    def _run(
        self,
        product: int,
        rows_ND: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        numbers: Sequence[torch.Tensor],
    ) -> None:
        def two(tensors: Sequence[torch.Tensor | None]) -> list[int | None]:
            places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            return places + [None] * (2 - len(places))

        lib = library()
        assert lib is not None, "who calls this has asked whether there are kernels"
        N, E = self.mask_NE.shape
        status = lib.lte_train(
            DTYPES[rows_ND.dtype],
            product,
            (ctypes.c_int64 * 5)(N, self.D, E, self.S, len(numbers)),
            torch.get_num_threads(),
            ctypes.c_void_p(self.mask_NE.data_ptr()),
            (ctypes.c_void_p * 7)(rows_ND.data_ptr(), *two(weights), *two(biases), *two(numbers)),
        )
        if status:
            raise MemoryError("the cpu kernel found no memory for its buffers")


def training_type(dtype: torch.dtype, neurons: int, width: int) -> torch.dtype | None:
    """Returns the type that these products compute in here: the type itself, float32 in place of it, or None.

    bfloat16 is multiplied as it is where the machine multiplies pairs of it and rows are even.
    """
    lib = library()
    if lib is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    return dtype if lib.lte_trains(DTYPES[dtype], ctypes.c_int64(width), ctypes.c_int64(neurons)) else torch.float32

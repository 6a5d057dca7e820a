"""Run one token of each sequence through a whole quantised decoder in one call of decoder.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import DTYPES
from lte_lightning.kernels.layout import ACTIVATIONS
from lte_lightning.kernels.quantized import Quantized


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix and its bias. The bias has the type of the activations."""

    weight: Quantized
    bias_R: torch.Tensor | None = None

    def entries(self) -> list[int]:
        """Returns its entries of the table."""
        return [_address(self.weight.blocks), _address(self.weight.scale), _address(self.bias_R), self.weight.bits]


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer. Without another remark, all but the matrices have the type of the activations."""

    norm_D: torch.Tensor
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    q_norm_H: torch.Tensor | None
    k_norm_H: torch.Tensor | None
    ffn_norm_D: torch.Tensor
    router_ED: torch.Tensor  # of any type
    router_bias_E: torch.Tensor | None  # of the type of router_ED
    tau: torch.Tensor  # float32
    up: Matrix
    gate: Matrix | None
    down: Matrix

    def entries(self) -> list[int]:
        """Returns its row of the table, without the cache, in the order of LayerField in decoder.h."""
        router = [_address(self.router_ED), _address(self.router_bias_E), DTYPES[self.router_ED.dtype]]
        return [
            _address(self.norm_D),
            *(entry for matrix in (self.q, self.k, self.v, self.o) for entry in matrix.entries()),
            *map(_address, (self.q_norm_H, self.k_norm_H, self.ffn_norm_D)),
            *router,
            _address(self.tau),
            *self.up.entries(),
            *([0] * 4 if self.gate is None else self.gate.entries()),
            *self.down.entries(),
        ]


@dataclass(frozen=True)
class Decoder:
    """The weights of a decoder. They must stay where they are, because the table holds their addresses.

    Args:
        layers: Its layers, all of one shape.
        norm_D: The last norm.
        head: The head [V, D].
        heads: Heads of queries, heads of keys and values, and H, the width of each.
        activation: The FFNs' activation, a name in `layout.ACTIVATIONS`.
        epsilon: The epsilon of every norm.
        scaling: The factor of the products of queries and keys.
    """

    layers: Sequence[DecoderLayer]
    norm_D: torch.Tensor
    head: Matrix
    heads: tuple[int, int, int]
    activation: str
    epsilon: float
    scaling: float

    def table(self) -> torch.Tensor:
        """Returns the table of addresses [layers + 1, fields]. The last three of a layer belong to its cache."""
        rows = [[*layer.entries(), 0, 0, 0] for layer in self.layers]
        last = [_address(self.norm_D), *self.head.entries()]
        return torch.tensor([*rows, [*last, *[0] * (len(rows[0]) - len(last))]])


def run_decoder(
    decoder: Decoder,
    table: torch.Tensor,
    x_ND: torch.Tensor,
    ids: Sequence[int] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    places: int,
    position: int,
    mask_NT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the logits [N, V] of N sequences' next token, and puts keys and values in the cache.

    Activations have the type of ``x_ND``, and are rounded as the modules of transformers round them.

    Args:
        decoder: The weights.
        table: The decoder's table with the cache's addresses: contiguous keys and values [N, heads, places, H], and an
            int64 that the call raises by one, or 0.
        x_ND: The embedded tokens. The call overwrites them.
        ids: Rows of the head to look up into ``x_ND``, if the head is also the embedding; else None.
        rotary: Cosine and sine of each sequence's position [N, H].
        places: How many tokens the cache has room for.
        position: The token's place. All places before it are filled.
        mask_NT: True where a sequence sees a place; None if it sees all.
    """
    lib = library()
    assert lib is not None
    (N, D), (q_heads, k_heads, H) = x_ND.shape, decoder.heads
    up, V = decoder.layers[0].up.weight.shape, decoder.head.weight.shape.outputs
    logits_NV = x_ND.new_empty((N, V))
    shown = 0 if mask_NT is None else mask_NT.shape[1]
    shape = (N, D, len(decoder.layers), q_heads, k_heads, H, up.row_parts, up.rows, V, position, places, shown)
    tensors = (*rotary, mask_NT, x_ND, logits_NV)
    ids_N = None if ids is None else ctypes.cast((ctypes.c_int64 * N)(*ids), ctypes.c_void_p)
    if lib.lte_decode(
        DTYPES[x_ND.dtype],
        (ctypes.c_int64 * len(shape))(*shape),
        (ctypes.c_float * 2)(decoder.epsilon, decoder.scaling),
        ctypes.c_void_p(table.data_ptr()),
        torch.get_num_threads(),
        list(ACTIVATIONS).index(decoder.activation),
        (ctypes.c_void_p * 6)(ids_N, *(None if tensor is None else tensor.data_ptr() for tensor in tensors)),
    ):
        raise MemoryError("the cpu kernel found no memory for its buffers")
    return logits_NV


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

"""Quantised linear layers and experts on the CPU, as the torch operators ``quantized_linear`` and ``quantized_ffn``."""

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.ffn import DTYPES
from lte_lightning.kernels.layout import ACTIVATIONS
from lte_lightning.kernels.quantized import Bits, Quantized, QuantizedExperts, Shape, dequantize
from lte_lightning.kernels.views import run_views


def run_quantized_linear(x_BTK: torch.Tensor, matrix: Quantized, bias_R: torch.Tensor | None = None) -> torch.Tensor:
    """Computes a linear layer whose weight is quantised; the input is rounded to 8 bits in groups of 32.

    Sums within a group are exact. Sums of groups are float32 in a fixed order, so a row of the output depends neither
    on other rows nor on the threads.

    Args:
        x_BTK: Input, float32, bfloat16 or float16.
        matrix: The weight.
        bias_R: The bias.

    Returns:
        The output [B, T, R] in the type of the input.
    """
    return torch.ops.lte_lightning.quantized_linear(x_BTK, matrix.blocks, matrix.scale, bias_R, matrix.shape.ints())


def run_quantized(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: QuantizedExperts) -> torch.Tensor:
    """Computes the selected experts' output; inputs and hidden activations are rounded to 8 bits in groups of 32.

    The kernels skip an expert that no token selected. A token with NaN or infinity in its input gets NaN.

    Args:
        x_ND: Input of N tokens, float32, bfloat16 or float16.
        mask_NE: True where a token runs an expert.
        weights: The FFN.

    Returns:
        The output [N, D], in the type of ``x_ND``.
    """
    w = weights
    gate = (None, None) if w.gate is None else (w.gate.blocks, w.gate.scale)
    biases = (w.up_bias_F, w.gate_bias_F, w.down_bias_D)
    return torch.ops.lte_lightning.quantized_ffn(
        x_ND, mask_NE, w.up.blocks, w.up.scale, *gate, w.down.blocks, w.down.scale, *biases, w.activation,
        w.up.shape.rows,
    )  # fmt: skip


torch.library.define(
    "lte_lightning::quantized_linear", "(Tensor x, Tensor blocks, Tensor scale, Tensor? bias, int[] shape) -> Tensor"
)
torch.library.define(
    "lte_lightning::quantized_ffn",
    "(Tensor x, Tensor mask, Tensor up, Tensor up_scale, Tensor? gate, Tensor? gate_scale, Tensor down, "
    "Tensor down_scale, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, str activation, int expert_size) "
    "-> Tensor",
)


def _require_type(x: torch.Tensor) -> int:
    if x.dtype not in DTYPES:
        raise ValueError(f"the input is {x.dtype}; quantised weights are computed for {', '.join(map(str, DTYPES))}")
    return DTYPES[x.dtype]


def _call(function: "ctypes._FuncPointer", *arguments: object) -> None:
    if function(*arguments):
        raise MemoryError("the cpu kernel found no memory for its buffers")


def _addresses(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def _bits(blocks: torch.Tensor) -> Bits:
    return 8 if blocks.shape[3] == 8 else 4


class _LastInput(threading.local):
    """The input that a thread rounded last. Query, key and value read the same one, and round it once.

    A change of the input in place is seen by its version. Code that writes past torch, as through numpy, does not raise
    it: so the first of several matrices, which comes again, rounds again.
    """

    def __init__(self) -> None:
        self.input: Callable[[], torch.Tensor | None] = lambda: None
        self.facts: tuple[Any, ...] = ()
        self.matrices: set[int] = set()

    def is_rounded(self, x: torch.Tensor, blocks: torch.Tensor, *facts: Any) -> bool:
        """Says whether the thread's last input was this one, and takes it for the last input."""
        if x.is_inference():  # such a tensor has no version
            self.facts = ()
            return False
        facts = (*facts, x._version, x.data_ptr())
        matrix = blocks.data_ptr()
        again = self.facts == facts and self.input() is x and matrix not in self.matrices
        if not again:
            self.input, self.facts, self.matrices = weakref.ref(x), facts, set()
        self.matrices.add(matrix)
        return again


_last = _LastInput()


@torch.library.impl("lte_lightning::quantized_linear", "CPU")
def _linear(
    x: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, shape: Sequence[int]
) -> torch.Tensor:
    dtype, lib = _require_type(x), library()
    row_parts, rows, column_parts, columns = shape
    if x.shape[-1] != column_parts * columns:
        raise ValueError(f"the input has shape {list(x.shape)}, and the weight wants [..., {column_parts * columns}]")
    if lib is None:
        weight_RK = dequantize(Quantized(blocks, scale, Shape(*shape))).to(x.dtype)
        return functional.linear(x, weight_RK, None if bias is None else bias.to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty((*x.shape[:-1], row_parts * rows))
    N, bits = y.numel() // y.shape[-1], _bits(blocks)
    given = None if _last.is_rounded(x, blocks, id(lib), bits, N, column_parts, columns) else x.contiguous()
    try:
        _call(
            lib.lte_quantized_linear,
            dtype,
            bits,
            (ctypes.c_int64 * 5)(N, row_parts, rows, column_parts, columns),
            torch.get_num_threads(),
            _addresses((given, blocks, scale, bias, y)),
        )
    except MemoryError:
        _last.facts = ()
        raise
    return y


@torch.library.register_fake("lte_lightning::quantized_linear")
def _fake_linear(x, blocks, scale, bias, shape):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], shape[0] * shape[1]))


@torch.library.impl("lte_lightning::quantized_ffn", "CPU")
def _ffn(
    x: torch.Tensor,
    mask: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor,
    gate: torch.Tensor | None,
    gate_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    expert_size: int,
) -> torch.Tensor:
    dtype, lib = _require_type(x), library()
    (N, D), E = x.shape, mask.shape[1]
    biases = [None if bias is None else bias.to(x.dtype).contiguous() for bias in (up_bias, gate_bias, down_bias)]
    if lib is None:
        rows, columns = Shape(E, expert_size, 1, D), Shape(1, D, E, expert_size)
        weights = QuantizedExperts(
            Quantized(up, up_scale, rows),
            Quantized(down, down_scale, columns),
            activation,
            None if gate is None or gate_scale is None else Quantized(gate, gate_scale, rows),
            *biases,
        )
        return run_views(x, mask, weights.dequantized(x.dtype))
    x, mask = x.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    _call(
        lib.lte_quantized_ffn,
        dtype,
        _bits(up),
        (ctypes.c_int64 * 4)(N, D, E, expert_size),
        list(ACTIVATIONS).index(activation),
        torch.get_num_threads(),
        ctypes.c_void_p(mask.data_ptr()),
        _addresses((x, up, up_scale, gate, gate_scale, down, down_scale, *biases, y)),
    )
    return y


@torch.library.register_fake("lte_lightning::quantized_ffn")
def _fake_ffn(x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)

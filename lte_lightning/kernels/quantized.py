"""Matrices of 8 or 4 bits in the blocks that the cpu kernels read, and FFN weights made of them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ExpertWeights

Bits = Literal[8, 4]
LANES, GROUP = 16, 32  # outputs of a block; inputs of a block, which share a scale
ZERO = {8: 128, 4: 8}  # weights are stored unsigned
AT_ONCE = 4096  # groups to round at a time, so that they stay in the cache
TRIES = 16  # scales to try for a group of 4 bits


@dataclass(frozen=True)
class Shape:
    """How a matrix is split by expert: over its outputs or over its inputs. Padding fills each part to whole blocks.

    Args:
        row_parts: Parts of the outputs.
        rows: Outputs of a part.
        column_parts: Parts of the inputs.
        columns: Inputs of a part.
    """

    row_parts: int
    rows: int
    column_parts: int = 1
    columns: int = 1

    @property
    def outputs(self) -> int:
        """The number of outputs, R."""
        return self.row_parts * self.rows

    @property
    def inputs(self) -> int:
        """The number of inputs, K."""
        return self.column_parts * self.columns

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The numbers of input parts, of output blocks, and of groups in an input part."""
        return self.column_parts, self.row_parts * math.ceil(self.rows / LANES), math.ceil(self.columns / GROUP)

    def ints(self) -> list[int]:
        """Returns the fields as a list, which a custom operator can take."""
        return [self.row_parts, self.rows, self.column_parts, self.columns]


@dataclass(frozen=True)
class Quantized:
    """A matrix [R, K] of 8 or 4 bits.

    Args:
        blocks: uint8 [column parts, blocks of outputs, groups, steps, 16, 4]. A step is 4 inputs at 8 bits, and 8
            inputs at 4 bits, where the low halves of the bytes are the first four inputs.
        scale: bfloat16 [column parts, blocks of outputs, groups, 16].
        shape: The matrix's size and parts.
    """

    blocks: torch.Tensor
    scale: torch.Tensor
    shape: Shape

    @property
    def bits(self) -> Bits:
        """Bits per weight, 8 or 4."""
        return 8 if self.blocks.shape[3] == 8 else 4


@dataclass(frozen=True)
class QuantizedExperts:
    """The quantised weights of one FFN, by expert.

    Args:
        up: Up projection [F, D], with one part of its rows per expert.
        down: Down projection [D, F], with one part of its columns per expert.
        activation: A name in `layout.ACTIVATIONS`.
        gate: Gate projection of a gated FFN.
        up_bias_F: Bias of the up projection.
        gate_bias_F: Bias of the gate projection.
        down_bias_D: Bias of the output, always added.
    """

    up: Quantized
    down: Quantized
    activation: str
    gate: Quantized | None = None
    up_bias_F: torch.Tensor | None = None
    gate_bias_F: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> ExpertWeights:
        """Returns the weights in a floating-point type."""
        E, S = self.up.shape.row_parts, self.up.shape.rows

        def rows(matrix: Quantized, transposed: bool = False) -> torch.Tensor:
            weight_RK = dequantize(matrix).to(dtype)
            return (weight_RK.T if transposed else weight_RK).unflatten(0, (E, S)).contiguous()

        def bias(tensor: torch.Tensor | None, by_expert: bool = True) -> torch.Tensor | None:
            return None if tensor is None else (tensor.unflatten(0, (E, S)) if by_expert else tensor).to(dtype)

        return ExpertWeights(
            rows(self.up),
            rows(self.down, transposed=True),
            self.activation,
            None if self.gate is None else rows(self.gate),
            bias(self.up_bias_F),
            bias(self.gate_bias_F),
            bias(self.down_bias_D, by_expert=False),
        )


@torch.no_grad()
def quantize_matrix(weight_RK: torch.Tensor, bits: Bits, shape: Shape) -> Quantized:
    """Rounds a matrix to 8 or 4 bits; 32 neighbouring inputs of an output share a scale.

    At 4 bits it tries several scales and keeps the scale with the least squared error.

    Args:
        weight_RK: Finite values, of any floating-point type.
        bits: 8 or 4.
        shape: The matrix's size and parts.

    Raises:
        ValueError: If the weight has another shape, or is not finite.
    """
    if tuple(weight_RK.shape) != (shape.outputs, shape.inputs):
        raise ValueError(f"the weight has shape {list(weight_RK.shape)}, expected [{shape.outputs}, {shape.inputs}]")
    weight_RK = weight_RK.detach().float()
    if not weight_RK.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values")
    rounded = _round_to_8 if bits == 8 else _round_to_4
    groups = _grouped(weight_RK, shape)
    parts = [rounded(w_NG) for w_NG in groups.flatten(0, 2).split(AT_ONCE)]
    q, scale = (torch.cat(tensors).unflatten(0, groups.shape[:3]) for tensors in zip(*parts, strict=True))
    return Quantized(_to_blocks(q, shape, bits), _lanes(scale.unsqueeze(-1), shape).squeeze(-1), shape)


def _round_to_8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns -127 .. 127 for groups [N, 32], and their scales [N]."""
    scale = (w.abs().amax(dim=-1, keepdim=True) / 127).bfloat16()
    q = (w / torch.where(scale == 0, 1.0, scale.float())).round().clamp(-127, 127)
    return q.to(torch.int8), scale.squeeze(-1)


def _round_to_4(w_NG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns -8 .. 7 for groups [N, 32], and their scales [N]."""
    largest = w_NG.gather(-1, w_NG.abs().argmax(dim=-1, keepdim=True)).T
    w = w_NG.T.contiguous()  # [32, N]: torch adds long rows faster than it sums short rows
    best_scale, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    q, product = torch.empty_like(w), torch.empty_like(w)

    def round_by(scale: torch.Tensor) -> None:
        torch.div(w, scale.masked_fill(scale == 0, 1.0), out=q).round_().clamp_(-8, 7)

    for i in range(TRIES):  # the largest value becomes -8.5 to -6.5 steps before it is rounded
        round_by((largest / (-8.5 + 2.0 * i / (TRIES - 1))).bfloat16().float())  # the sign lets the largest become -8
        # Find the best scale for these integers, then the best integers for that scale.
        along = torch.mul(w, q, out=product).sum(0, keepdim=True)
        square = torch.mul(q, q, out=product).sum(0, keepdim=True)
        scale = (along / square.clamp_min_(1.0)).bfloat16().float()
        round_by(scale)
        error = torch.mul(q, scale, out=product).sub_(w).square_().sum(0, keepdim=True)
        torch.where(error < least, scale, best_scale, out=best_scale)
        torch.minimum(error, least, out=least)
    round_by(best_scale)
    return q.T.to(torch.int8), best_scale.squeeze(0).bfloat16()


def _grouped(x_RK: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Returns the matrix as [R, column parts, groups, 32], padded with zeros."""
    x = x_RK.unflatten(1, (shape.column_parts, shape.columns))
    return functional.pad(x, (0, -shape.columns % GROUP)).unflatten(-1, (-1, GROUP))


def _lanes(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Turns [R, column parts, groups, ...] into [column parts, blocks of outputs, groups, 16, ...]."""
    x = x.unflatten(0, (shape.row_parts, shape.rows))
    x = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, -shape.rows % LANES))
    x = x.unflatten(1, (-1, LANES)).flatten(0, 1)  # [blocks of outputs, 16, column parts, groups, ...]
    return x.permute(2, 0, 3, 1, *range(4, x.ndim)).contiguous()


def _to_blocks(q: torch.Tensor, shape: Shape, bits: Bits) -> torch.Tensor:
    steps = _lanes(q, shape).unflatten(-1, (8, 4)).transpose(3, 4).contiguous()  # [..., 8, 16, 4]
    unsigned = (steps.to(torch.int16) + ZERO[bits]).to(torch.uint8)
    if bits == 8:
        return unsigned
    return unsigned[..., 0::2, :, :] | (unsigned[..., 1::2, :, :] << 4)


@torch.no_grad()
def dequantize(matrix: Quantized, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Returns a quantised matrix as float32 [R, K].

    Args:
        matrix: The quantised matrix.
        rows: Outputs to return instead of all, for a matrix without parts.
    """
    shape, blocks, scale = matrix.shape, matrix.blocks, matrix.scale
    if rows is not None:
        blocks = blocks[0, rows // LANES, :, :, rows % LANES].unsqueeze(-2)  # [N, groups, steps, 1, 4]
        scale = scale[0, rows // LANES, :, rows % LANES].unsqueeze(-1)
    if matrix.bits == 4:
        blocks = torch.stack((blocks & 15, blocks >> 4), dim=-3).flatten(-4, -3)
    q = blocks.to(torch.int16).sub_(ZERO[matrix.bits]).float()  # [..., 8, 16, 4]
    q = q.transpose(-2, -3).flatten(-2) * scale.float().unsqueeze(-1)  # [..., 16, 32]
    if rows is not None:
        return q.flatten(1)[:, : shape.inputs]
    # [column parts, blocks of outputs, groups, 16, 32] to [parts of rows, rows, column parts, columns]
    q = q.permute(1, 3, 0, 2, 4).flatten(3).unflatten(0, (shape.row_parts, -1)).flatten(1, 2)
    return q[:, : shape.rows, :, : shape.columns].reshape(shape.outputs, shape.inputs)

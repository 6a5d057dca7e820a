"""The CPU kernels, compiled for ARM and run in an emulator, agree with this machine's (nox -s arm)."""

import ctypes
import shutil
import struct
import subprocess
from math import prod
from pathlib import Path

import pytest
import torch

from lte_lightning.kernels.cpu import quantized as cpu_quantized
from lte_lightning.kernels.cpu.build import FLAGS, SOURCES, build
from lte_lightning.kernels.cpu.ffn import WAYS, run_compiled
from lte_lightning.kernels.cpu.instructions import ARM, instruction_set
from lte_lightning.kernels.cpu.quantized import run_quantized, run_quantized_linear
from lte_lightning.kernels.quantized import QuantizedExperts, Shape, quantize_matrix
from lte_lightning.kernels.reference import run_reference

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
SIZES = (4, 2, 2)  # bytes of a value of float32, bfloat16, float16
BLOCK = {8: 512, 4: 256}  # bytes of 16 outputs by 32 inputs

pytestmark = [
    pytest.mark.arm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (shutil.which(COMPILER) and EMULATOR), reason=f"there is no {COMPILER}, or no qemu-aarch64"),
]


class Emulated:
    """The library's functions. Each call copies the memory of its pointers to a program in the emulator, and back."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.call, self.out = program, folder / "call", folder / "out"

    def lte_ffn(self, dtype, shape, activation, threads, way, mask, pointers):
        N, D, E, S = shape
        counts = [N * D, E * S * D, E * S * D, E * S * D, E * S, E * S, D, N * D]
        sizes = [SIZES[dtype] * count for count in counts]
        return self._run(0, (dtype, activation, threads, way), shape, (mask, N * E), pointers, sizes)

    def lte_quantized_linear(self, dtype, bits, shape, threads, pointers):
        N, *parts = shape
        outputs, inputs = parts[0] * parts[1], parts[2] * parts[3]
        sizes = [SIZES[dtype] * N * inputs, *matrix(bits, *parts), SIZES[dtype] * outputs, SIZES[dtype] * N * outputs]
        return self._run(1, (dtype, bits, threads), shape, (None, 0), pointers, sizes)

    def lte_quantized_ffn(self, dtype, bits, shape, activation, threads, mask, pointers):
        N, D, E, S = shape
        half, down = matrix(bits, E, S, 1, D), matrix(bits, 1, D, E, S)
        counts = [E * S, E * S, D, N * D]
        sizes = [SIZES[dtype] * N * D, *half, *half, *down, *(SIZES[dtype] * count for count in counts)]
        return self._run(2, (dtype, bits, activation, threads), shape, (mask, N * E), pointers, sizes)

    def _run(self, function, numbers, shape, mask, pointers, sizes):
        places = [(ctypes.addressof(shape), 8 * len(shape)), (getattr(mask[0], "value", None), mask[1])]
        places += [*zip(pointers, sizes, strict=True)]
        memories = [b"" if address is None else ctypes.string_at(address, size) for address, size in places]
        head = [function, *numbers, *[0] * (6 - len(numbers)), len(memories), *map(len, memories)]
        self.call.write_bytes(struct.pack(f"={len(head)}q", *head) + b"".join(memories))
        status = subprocess.run([EMULATOR, "-cpu", "max", self.program, self.call, self.out], check=False).returncode
        content = self.out.read_bytes()
        assert len(content) == sizes[-1]
        ctypes.memmove(pointers[-1], content, len(content))
        return status


def matrix(bits, row_parts, rows, column_parts, columns):
    """The bytes of a quantised matrix's blocks and scales."""
    blocks = row_parts * -(-rows // 16) * column_parts * -(-columns // 32)
    return blocks * BLOCK[bits], 2 * 16 * blocks


@pytest.fixture(scope="module", params=ARM)
def arm(request, tmp_path_factory) -> Emulated:
    folder = tmp_path_factory.mktemp("arm")
    sources = (*sorted(SOURCES.glob("*.cpp")), Path(__file__).with_name("emulated.cpp"))
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(
        [COMPILER, *flags, *ARM[request.param], *sources, "-o", folder / "program", "-static", "-pthread"], check=True
    )
    return Emulated(folder / "program", folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "gelu")])
def test_experts(arm, dtype, gated, activation, make_weights, assert_agrees):
    for tokens, threads in ((1, 1), (30, 2)):
        weights = make_weights(5, 24, 70, gated=gated, biases=True, dtype=dtype, activation=activation)
        x_ND, mask_NE = torch.randn(tokens, 70).to(dtype), torch.rand(tokens, 5) > 0.5
        torch.set_num_threads(threads)
        for way in WAYS:
            assert_agrees(run_compiled(arm, x_ND, mask_NE, weights, way), run_reference(x_ND, mask_NE, weights))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_quantised(arm, bits, gated, monkeypatch):
    E, S, D = 5, 24, 70
    up, gate, down = (
        quantize_matrix(torch.randn(shape.outputs, shape.inputs) * shape.inputs**-0.5, bits, shape)
        for shape in (Shape(E, S, 1, D), Shape(E, S, 1, D), Shape(1, D, E, S))
    )
    gate, gate_bias = (gate, torch.randn(E * S)) if gated else (None, None)
    weights = QuantizedExperts(up, down, "silu", gate, torch.randn(E * S), gate_bias, torch.randn(D))
    head = quantize_matrix(torch.randn(100, D), bits, Shape(1, 100, 1, D))
    for tokens in (1, 30):
        x_ND, mask_NE = torch.randn(tokens, D), torch.rand(tokens, E) > 0.5
        results = []
        for library in (build(instruction_set()), arm):
            monkeypatch.setattr(cpu_quantized, "library", lambda library=library: library)
            results.append((run_quantized(x_ND, mask_NE, weights), run_quantized_linear(x_ND, head)))
        (experts, logits), (arm_experts, arm_logits) = results
        torch.testing.assert_close(arm_logits, logits, rtol=1e-5, atol=1e-5)
        # a hidden activation may fall on the other side of a rounding
        assert (arm_experts - experts).norm() < 0.005 * experts.norm()


def test_sizes_are_those_of_the_layout():
    for bits in (8, 4):
        for shape in (Shape(5, 24, 1, 70), Shape(1, 70, 5, 24)):
            kept = quantize_matrix(torch.randn(shape.outputs, shape.inputs), bits, shape)
            assert matrix(bits, *shape.ints()) == (prod(kept.blocks.shape), 2 * prod(kept.scale.shape))

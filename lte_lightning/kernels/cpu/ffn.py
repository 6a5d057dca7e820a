"""The ``cpu`` backend: ffn.cpp, which build.py compiles, as the torch operator ``lte_lightning::cpu_ffn``."""

import ctypes
from typing import NamedTuple

import torch

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.instructions import instruction_set
from lte_lightning.kernels.cpu.processor import cpu_flags
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.views import run_views

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WAYS = ("any", "few", "many")


class Costs(NamedTuple):
    """Nanoseconds per weight of an expert: a cost for the expert, and a cost for each token that runs it."""

    few: tuple[float, float]
    many: tuple[float, float]
    dense: tuple[float, float]


# The types and instruction sets where torch's own product of all experts may be faster, measured on one core of Zen 4
# with oneDNN (LLaMA-2-7B's shape). All others run sparsely, because torch was slower at every sparsity. With tile
# instructions (AMX) torch's product is estimated to be six times as fast.
COSTS = {
    (torch.bfloat16, "avx512_bf16"): Costs(few=(0.12, 0.0145), many=(0.22, 0.0115), dense=(0.153, 0.0087)),
    (torch.bfloat16, "amx"): Costs(few=(0.12, 0.0145), many=(0.22, 0.0115), dense=(0.153, 0.0015)),
}


def run_cpu(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output on the CPU, with torch's number of threads, float32 sums and no gradient.

    The kernels read weights in place, and skip an expert that no token selected. Without a C++ compiler, torch computes
    the same over views of the experts. That is slower, and a warning says so.

    Args:
        x_ND: Input of N tokens, float32, bfloat16 or float16.
        mask_NE: True where a token runs an expert.
        weights: The FFN, of the same type.

    Returns:
        The output [N, D], in the type of ``x_ND``.
    """
    w = weights
    return torch.ops.lte_lightning.cpu_ffn(
        x_ND, mask_NE, w.up_ESD, w.down_ESD, w.activation, w.gate_ESD, w.up_bias_ES, w.gate_bias_ES, w.down_bias_D
    )


torch.library.define(
    "lte_lightning::cpu_ffn",
    "(Tensor x, Tensor mask, Tensor up, Tensor down, str activation, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias) -> Tensor",
)


@torch.library.impl("lte_lightning::cpu_ffn", "CPU")
def _cpu_ffn(
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    up_ESD: torch.Tensor,
    down_ESD: torch.Tensor,
    activation: str,
    gate_ESD: torch.Tensor | None,
    up_bias_ES: torch.Tensor | None,
    gate_bias_ES: torch.Tensor | None,
    down_bias_D: torch.Tensor | None,
) -> torch.Tensor:
    weights = ExpertWeights(up_ESD, down_ESD, activation, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D)
    lib = library()
    if lib is None:
        return run_views(x_ND, mask_NE, weights)
    if dense_is_faster(mask_NE, up_ESD.dtype):
        return run_dense_mask(x_ND, mask_NE, weights)
    return run_compiled(lib, x_ND, mask_NE, weights)


def dense_is_faster(mask_NE: torch.Tensor, dtype: torch.dtype) -> bool:
    """Says whether tokens select so many experts that computing all of them and masking is faster.

    The answer is False if no token needs some expert, because the weights of such an expert must not be read.
    """
    tokens = len(mask_NE)
    costs = COSTS.get((dtype, "amx" if has_amx() else instruction_set()))
    if costs is None or tokens < 4:
        return False
    counts = mask_NE.sum(dim=0).tolist()
    if not all(counts):
        return False
    per_expert = sum(counts) / len(counts)
    few, many = (expert + token * per_expert for expert, token in (costs.few, costs.many))
    return costs.dense[0] + costs.dense[1] * tokens < min(few, many)


@torch.library.register_fake("lte_lightning::cpu_ffn")
def _fake(x_ND, mask_NE, up_ESD, down_ESD, activation, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format)


def run_compiled(
    lib: ctypes.CDLL, x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights, way: str = "any"
) -> torch.Tensor:
    """Calls the kernels for few or for many tokens per expert; with the way "any", they choose themselves."""
    if x_ND.dtype not in DTYPES or x_ND.dtype != weights.up_ESD.dtype:
        raise ValueError(
            f"the input is {x_ND.dtype} and the weights are {weights.up_ESD.dtype}; the cpu kernels want both of one "
            f"type, of {', '.join(map(str, DTYPES))}"
        )
    w = weights
    tensors = (x_ND, w.up_ESD, w.gate_ESD, w.down_ESD, w.up_bias_ES, w.gate_bias_ES, w.down_bias_D)
    kept = [None if tensor is None else tensor.contiguous() for tensor in (*tensors, mask_NE)]  # mostly no copy
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    *addresses, mask_at, out_at = [None if tensor is None else tensor.data_ptr() for tensor in (*kept, out_ND)]
    E, S, D = w.up_ESD.shape
    status = lib.lte_ffn(
        DTYPES[x_ND.dtype],
        (ctypes.c_int64 * 4)(len(x_ND), D, E, S),
        list(ACTIVATIONS).index(w.activation),
        torch.get_num_threads(),
        WAYS.index(way),
        ctypes.c_void_p(mask_at),
        (ctypes.c_void_p * 8)(*addresses, out_at),
    )
    if status:
        raise MemoryError("the cpu kernel found no memory for its buffers")
    return out_ND


def has_amx() -> bool:
    """Says whether torch multiplies bfloat16 in tiles here."""
    return "amx_bf16" in cpu_flags() and torch.backends.cpu.get_cpu_capability() == "AVX512"

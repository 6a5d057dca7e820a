"""The ``cpu`` backend: ffn.cpp, which build.py compiles, as the torch operator ``lte_lightning::cpu_ffn``."""

import ctypes

import torch

from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.costs import costs
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.views import run_views

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WAYS = ("any", "few", "many")


# From this many tokens on, the way is chosen by costs. Fewer tokens are bound by memory.
SEVERAL = 4


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
    measured = costs(lib, up_ESD.dtype, _compute) if len(mask_NE) >= SEVERAL and up_ESD.dtype in DTYPES else None
    return _compute("any" if measured is None else measured.fastest(mask_NE), x_ND, mask_NE, weights)


def _compute(way: str, x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes an FFN with the compiled kernels in one of `WAYS`, or in torch's own products of all experts."""
    lib = library()
    if lib is None or way == "dense":
        return run_dense_mask(x_ND, mask_NE, weights)
    return run_compiled(lib, x_ND, mask_NE, weights, way)


def measure_costs() -> list[str]:
    """Measures now what the first calls would; returns the names of the types whose costs are known here."""
    lib = library()
    known = [dtype for dtype in DTYPES if lib is not None and costs(lib, dtype, _compute) is not None]
    return [str(dtype).removeprefix("torch.") for dtype in known]


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

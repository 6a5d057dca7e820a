"""Choose a backend for the selected experts, and run it."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from lte_lightning.kernels.cpu.ffn import DTYPES, run_cpu
from lte_lightning.kernels.cpu.quantized import run_quantized
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.quantized import QuantizedExperts
from lte_lightning.kernels.reference import run_reference
from lte_lightning.kernels.skipping import run_skipping

Backend = Literal["auto", "dense-mask", "reference", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Up to this many tokens, float32 weights in place are faster than bfloat16 copies of them. The limit that was measured
# on a CPU is 64 for RoBERTa-base and about 300 for LLaMA-2-7B, whose copies need fresh memory at each call.
MIXED_IN_PLACE = 128

HAS_TRITON = find_spec("triton") is not None  # once, because torch.compile does not trace find_spec

logger = logging.getLogger("lte_lightning")
_said: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """The chosen backend, and why it is not the requested or a faster one (``fallback``; empty if it is)."""

    backend: Backend
    fallback: str = ""


def choose(backend: Backend, x: torch.Tensor, weight: torch.Tensor, gradient: bool = False) -> Choice:
    """Chooses a backend by device, type and gradient. Each backend adapts to the number of tokens itself.

    Args:
        backend: The requested backend.
        x: The input.
        weight: Any of the expert weights.
        gradient: Whether the result must be differentiable.

    Returns:
        The choice. ``dense-mask`` replaces an unavailable backend, without an error.
    """
    if backend == "dense-mask":
        return Choice("dense-mask")
    if gradient:
        return Choice("dense-mask", "a gradient may be needed here; torch.no_grad() allows the sparse kernels")
    kind, mixed = x.device.type, autocast_dtype(x)
    if mixed is not None and weight.dtype not in (torch.float32, mixed):
        return Choice("dense-mask", f"autocast computes in {mixed}, the weights are {weight.dtype}")
    if mixed is None and x.dtype != weight.dtype:
        return Choice("dense-mask", f"input and weights differ in type ({x.dtype}, {weight.dtype})")
    if backend == "reference":
        return Choice("reference")
    if x.dtype not in DTYPES:
        return Choice("dense-mask", f"no sparse backend computes in {x.dtype}")
    if kind == "cpu" and backend in ("auto", "cpu"):
        return Choice("cpu")
    if kind == "cuda" and backend in ("auto", "triton"):
        missing = why_no_triton()
        return Choice("dense-mask", missing) if missing else Choice("triton")
    if kind == "cpu" and backend == "triton" and is_interpreted():
        return Choice("triton")
    missing = why_no_triton() if backend == "triton" else ""
    return Choice("dense-mask", f"backend {backend!r} does not run on {kind!r}{missing and f' ({missing})'}")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Returns the type that autocast computes in on the tensor's device, None if it is off."""
    kind = x.device.type
    on = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def why_no_triton() -> str:
    """Says why the triton backend cannot run here, "" if it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    return "" if torch.cuda.is_available() else "triton sees no device"


def is_interpreted() -> bool:
    """Says whether Triton's kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1, for tests."""
    if not HAS_TRITON:
        return False
    from lte_lightning.kernels.triton.common import INTERPRETED

    return INTERPRETED


def run_router(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, threshold: torch.Tensor
) -> torch.Tensor:
    """Computes the mask of LTE's router on the triton backend.

    Args:
        x_ND: The FFN's input, which may have any type under autocast.
        weight_ED: The router's weights.
        bias_E: The router's bias.
        threshold: tau, a single float32 number on the device.

    Returns:
        The mask [N, E]: True where the score exceeds the threshold.
    """
    from lte_lightning.kernels.triton.router import route_triton

    return route_triton(x_ND.to(autocast_dtype(x_ND) or x_ND.dtype), weight_ED, bias_E, threshold)


def run_experts(
    backend: Backend | Literal["skipping"],
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    weights: ExpertWeights | QuantizedExperts,
) -> torch.Tensor:
    """Computes the selected experts' output on a chosen backend.

    Under autocast the result has autocast's type, like the dense FFN's. Few tokens use the weights in place, in their
    own type, which is faster than a conversion. For many tokens each call converts the weights, as autocast does.

    Args:
        backend: Any backend but ``auto``; ``skipping`` is differentiable.
        x_ND: Input of N tokens, of the weights' type. Under autocast it may have any type.
        mask_NE: True where a token runs an expert.
        weights: The FFN.

    Returns:
        The output [N, D] in the type of ``x_ND``, or in autocast's type.

    Raises:
        ValueError: If the mask or the input does not fit the weights.
    """
    mixed = autocast_dtype(x_ND)
    if isinstance(weights, QuantizedExperts):
        x_ND = x_ND if mixed is None else x_ND.to(mixed)
        _check(x_ND, mask_NE, weights.up.shape.row_parts, weights.up.shape.inputs)
        if backend == "reference":
            return run_reference(x_ND, mask_NE, weights.dequantized(torch.float32))
        return run_quantized(x_ND, mask_NE, weights)
    if mixed is not None:
        dtype = weights.up_ESD.dtype if len(x_ND) <= MIXED_IN_PLACE else mixed
        with torch.autocast(x_ND.device.type, enabled=False):
            return run_experts(backend, x_ND.to(dtype), mask_NE, weights.to(dtype)).to(mixed)
    E, _, D = weights.up_ESD.shape
    _check(x_ND, mask_NE, E, D)
    if backend == "triton":
        from lte_lightning.kernels.triton.ffn import run_triton  # torch.compile traces this, but not import_module

        return run_triton(x_ND, mask_NE, weights)
    run = {"cpu": run_cpu, "reference": run_reference, "dense-mask": run_dense_mask, "skipping": run_skipping}[backend]
    return run(x_ND, mask_NE, weights)


def _check(x_ND: torch.Tensor, mask_NE: torch.Tensor, E: int, D: int) -> None:
    if x_ND.ndim != 2 or x_ND.shape[1] != D:
        raise ValueError(f"the input has shape {tuple(x_ND.shape)}, expected [N, {D}]")
    if mask_NE.dtype != torch.bool or mask_NE.shape != (x_ND.shape[0], E):
        raise ValueError(
            f"the mask is {mask_NE.dtype} of shape {tuple(mask_NE.shape)}, expected torch.bool [{x_ND.shape[0]}, {E}] "
            f"for {x_ND.shape[0]} tokens and {E} experts"
        )


def say_once(message: str) -> None:
    """Logs a fallback the first time that it happens in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)

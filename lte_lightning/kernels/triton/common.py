"""Shared by the Triton kernels: activations, products in float32, and checks of the input."""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.driver import driver

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""

# Interpreted tl.dot on bfloat16 silently multiplies bit patterns.
UPCAST = tl.constexpr(INTERPRETED)


def check_device(x_ND: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    """Refuses an input or weights that the kernels cannot take.

    Args:
        x_ND: The input.
        others: Weights by name; these must be contiguous.

    Raises:
        ValueError: If a tensor does not fit; the message names it and a remedy.
    """
    if x_ND.dtype not in DTYPES:
        raise ValueError(f"the triton backend takes {', '.join(map(str, DTYPES))}, and x_ND is {x_ND.dtype}")
    if not (x_ND.is_cuda or (INTERPRETED and x_ND.device.type == "cpu")):
        raise ValueError(f"the triton backend needs a CUDA or ROCm device, and x_ND is on {x_ND.device}")
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, and x_ND on {x_ND.device}")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: lay it out once, by .contiguous(), not per call")


def is_hopper() -> bool:
    """Says whether the device is an Nvidia GPU of the Hopper generation or a later one."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= 90)


def dependent() -> dict[str, bool]:
    """Returns the options that let a launch start before the previous launch ends; empty before Hopper."""
    return {"PDL": True, "launch_pdl": True} if is_hopper() else {"PDL": False}


def has_buffers() -> bool:
    """Says whether the compiler turns loads into buffer loads, which have one base address: it does for AMD's chips."""
    return not INTERPRETED and driver.active.get_current_target().backend == "hip"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many multiprocessors a device has; a small number for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """Waits for the previous launch and all its writes. Before this, read nothing that an earlier launch writes."""
    if PDL:
        gdc_wait()


@triton.jit
def signal_next(PDL: tl.constexpr):
    """Lets the next launch start once every program of this launch has called this."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Computes an activation of `layout.ACTIVATIONS` in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def dot(a, b, acc):
    """Computes ``acc + a @ b`` with products and sums in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_bias(acc, bias_ptr, offsets, mask):
    """Adds a bias to ``acc``, if there is one; both have the shape of ``offsets``, or broadcast with it."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return acc

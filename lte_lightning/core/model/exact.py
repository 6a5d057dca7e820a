"""Find out whether a module computes exactly what the kernels compute from its weight and bias."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

# Classes whose values are their storage, and the classes that stand for them while torch traces. Any other class, like
# DTensor or torchao's, may hold a shard, quantised numbers, or its own function.
TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# What the kernels compute. Another library may replace these functions for every module of the class.
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, Conv1D)}
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


def why_not_linear(module: Any) -> str:
    """Says why a module is not its weight and bias alone, as a clause that has the module as its subject.

    Hooks do not count here: they change what a call computes, not what the weights are (see `what_surrounds`).

    Returns:
        "" for a ``Linear`` or ``Conv1D`` whose weight and bias are ordinary parameters.
    """
    kind = type(module)
    # Falcon's own Linear differs only in rounding: it adds the bias after it has rounded the product.
    if kind not in (nn.Linear, Conv1D) and kind.__name__ != "FalconLinear":
        return f"is a {kind.__name__}" + (f" of {kind.__module__}" if kind.__name__ in ("Linear", "Conv1D") else "")
    for name in ("weight", "bias"):
        if name not in module._parameters or name in module.__dict__:
            return f"computes its {name} (pruned, or reparametrised)"
        tensor = module._parameters[name]
        if tensor is None:
            continue
        if type(tensor) not in TENSORS:
            return f"has a {type(tensor).__name__} as its {name}"
        if tensor.layout is not torch.strided:
            return f"has a {name} of layout {tensor.layout}"
    return ""


def what_surrounds(module: nn.Module) -> str:
    """Returns a clause that names code which runs beside a module's ``forward``; "" if there is none."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if "forward" in module.__dict__:  # accelerate moves offloaded weights in such a forward
        return "has a forward of its own instead of its class's"
    kind = type(module)
    if kind.forward is not _FORWARDS.get(kind, kind.forward):
        return f"has a forward that replaced {kind.__name__}'s for all modules"
    return ""


def computes_on(module: nn.Module) -> torch.device:
    """Returns the device where a module computes. accelerate brings offloaded weights (``device_map``) there."""
    device = module.weight.device
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device  # type: ignore[return-value]


def is_sharded(module: nn.Module) -> bool:
    """Says by name, because torch may lack FSDP, whether either version of it manages a module's parameters."""
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__)


def is_part(tensor: Any) -> bool:
    """Says by its attributes, because torch may lack the class, whether a tensor is a DTensor, a process's part."""
    return hasattr(tensor, "placements")


def has_global_hooks() -> bool:
    """Says whether hooks run around every module's forward (``register_module_forward_hook`` and its kin)."""
    return any(map(len, _GLOBAL_HOOKS))


def mark(module: Any) -> tuple[Any, ...]:
    """Returns a cheap fingerprint of a module, equal as long as the parts that the kernels see stay the same.

    Values written in place do not change it. Another module, class, forward, hook, parameter, memory, type or layout
    does.
    """
    if not isinstance(module, nn.Module):
        return (id(module),)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        id(module),
        type(module),
        type(module).forward,
        bool(module._forward_hooks or module._forward_pre_hooks),
        "forward" in module.__dict__,
        module.training,
        id(weight),
        _address(weight),
        id(bias),
        _address(bias),
    )


def _address(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    if tensor is None or type(tensor) not in TENSORS:
        return ()
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride()
    except RuntimeError:  # a sparse layout has no address
        return ()

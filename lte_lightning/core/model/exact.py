"""Find out whether a module computes exactly what the kernels compute from its weight and bias."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.pytorch_utils import Conv1D

# Classes whose values are their storage, and the classes that stand for them while torch traces. Any other class, like
# DTensor or torchao's, may hold a shard, quantised numbers, or its own function.
TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
_BACKWARD_HOOKS = (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks)
# The functions that the modules of an FFN call. Another library may replace them for everybody.
_CALLED = (functional.linear, functional.relu, functional.gelu, functional.silu, torch.addmm)


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
    if _is_replaced(kind):
        return f"has a forward that replaced {kind.__name__}'s for all modules"
    return ""


@torch.compiler.assume_constant_result
def _is_replaced(kind: type[nn.Module]) -> bool:
    """Says whether a class's ``forward`` comes from another package than the class that it stands in."""
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    # A wrapper takes over its function's __module__, and never its __globals__.
    home = getattr(vars(owner)["forward"], "__globals__", {}).get("__name__", "")
    return home.partition(".")[0] != owner.__module__.partition(".")[0]


def runs_backward_hooks(*modules: Any) -> bool:
    """Says whether code waits for the gradients of a module's inputs or outputs."""
    own = (m for m in modules if isinstance(m, nn.Module))
    return any(map(len, _BACKWARD_HOOKS)) or any(m._backward_hooks or m._backward_pre_hooks for m in own)


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


def what_transforms() -> str:
    """Returns a clause that says what changes every call of torch now; "" if nothing does.

    torch.compile decides this for itself.
    """
    if torch.compiler.is_compiling():
        return ""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func or forward-mode differentiation transforms the call"
    # A TorchDispatchMode sees our operator, as it sees any other.
    if torch._C._len_torch_function_stack() and _has_function_mode():
        return "a mode of torch (TorchFunctionMode) sees every call"
    if (functional.linear, functional.relu, functional.gelu, functional.silu, torch.addmm) != _CALLED:
        return "a function of torch that the modules call was replaced"
    return ""


def _has_function_mode() -> bool:
    # `with torch.device(...)` and set_default_device only choose where new tensors are made.
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def mark(module: Any) -> tuple[Any, ...]:
    """Returns a cheap fingerprint of a module, equal as long as the parts that the kernels see stay the same.

    Values written in place do not change it. Another module, class, forward, hook, parameter, memory, type or layout
    does, and so does another attribute of a module without a weight (of an activation, or of quantised weights).
    """
    if not isinstance(module, nn.Module):
        return (id(module),)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        buffers = module._buffers.values()
        others = (*map(id, vars(module).values()), *map(id, buffers), *map(_address, buffers))
    else:
        others = ()
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
        others,
    )


def _address(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    if tensor is None or type(tensor) not in TENSORS:
        return ()
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride()
    except RuntimeError:  # a sparse layout has no address
        return ()

"""LayerNorm of a residual sum by our kernel, in encoders that close each half of a layer with one."""

import sys
from functools import cache
from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.exact import TENSORS, has_global_hooks, what_surrounds, what_transforms
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.kernels.cpu.norm import run_sum_norm

# Modules of transformers that compute LayerNorm(dropout(dense(hidden)) + input), and nothing else.
CLASSES = frozenset(
    f"{family}{part}" for family in ("Bert", "Roberta", "Electra", "DebertaV2") for part in ("SelfOutput", "Output")
) | {"MPNetOutput"}


def use_sum_norms(model: nn.Module, kernel: bool = True) -> None:
    """Lets our kernel compute the sums and LayerNorms of an encoder's layers, or undoes that.

    The kernel runs on a CPU in bfloat16 or float16, without gradients. Everything else goes to torch as before. The
    modules stay where they are: like ``fully_shard``, this gives each of them a subclass of its class.

    Args:
        model: A model of transformers. Others are left alone.
        kernel: False gives the modules their own classes again.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or family.kind != "encoder":
        return
    for module in model.modules():
        own: Any = type(module)
        if kernel and own.__name__ in CLASSES and own.__module__.startswith("transformers.models.") and _code_of(own):
            if not isinstance(module, _SumNorm):
                module.__class__ = _with_kernel(own)
        elif not kernel and isinstance(module, _SumNorm):
            module.__class__ = own.__mro__[2]


class _SumNorm(nn.Module):
    """Computes what the class beside it computes, by the kernel where that is the same."""

    _code: Any

    def forward(self, hidden_BTF: torch.Tensor, input_BTD: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a compiler fuses the sum with the norm itself
            plain: Any = super().forward(hidden_BTF, input_BTD)
            return plain
        dense: Any = self.dense
        dropout: Any = self.dropout
        norm: Any = self.LayerNorm
        own: Any = super().forward
        if getattr(own, "__code__", None) is not self._code:  # somebody replaced it in its class
            return own(hidden_BTF, input_BTD)
        x_BTD = dense(hidden_BTF)
        if _fits(x_BTD, input_BTD, norm, dropout):
            return run_sum_norm(x_BTD, input_BTD, norm.weight, norm.bias, norm.eps)
        return norm(dropout(x_BTD) + input_BTD)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__getstate__()


@cache
def _with_kernel(own: Any) -> Any:
    known = {"__module__": own.__module__, "__qualname__": own.__qualname__, "_code": _code_of(own)}
    return type(own.__name__, (_SumNorm, own), known)


def _code_of(own: Any) -> Any:
    """Returns the code of the class's own ``forward``; None if that comes from another file."""
    code = getattr(own.forward, "__code__", None)
    return code if code is not None and code.co_filename == sys.modules[own.__module__].__file__ else None


def _empty(own: Any) -> Any:
    """Returns a module of a class with the kernel, for copies and pickles, which fill it."""
    kind: Any = _with_kernel(own)
    return kind.__new__(kind)


def _fits(x: torch.Tensor, residual: torch.Tensor, norm: nn.Module, dropout: nn.Module) -> bool:
    """Says whether the kernel computes the same as the modules."""
    if type(norm) is not nn.LayerNorm or type(dropout) is not nn.Dropout:
        return False
    given = (x, residual, norm.weight, *([] if norm.bias is None else [norm.bias]))
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)  # as for attention: float32 keeps torch's bits
        and all(type(each) in TENSORS and each.dtype == x.dtype for each in given)
        and x.shape == residual.shape
        and tuple(norm.normalized_shape) == x.shape[-1:]
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in given))
        and not dropout.training
        and not torch.is_autocast_enabled("cpu")
        and not what_surrounds(norm)
        and not what_surrounds(dropout)
        and not has_global_hooks()
        and not what_transforms()
    )

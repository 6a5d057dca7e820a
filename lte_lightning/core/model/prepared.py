"""The prepared backend of an expert FFN: chosen once, and kept until a condition of the choice changes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.exact import (
    TENSORS,
    has_global_hooks,
    mark,
    runs_backward_hooks,
    what_surrounds,
    what_transforms,
    why_not_linear,
)
from lte_lightning.core.model.parts import FfnParts
from lte_lightning.core.model.quantized import QuantizedLinear
from lte_lightning.core.model.storage import expert_weights
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import Backend, Choice, autocast_dtype, choose, run_experts, run_router, say_once
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.quantized import QuantizedExperts
from lte_lightning.kernels.skipping import skips
from lte_lightning.selection import Selector


@dataclass(frozen=True)
class Prepared:
    """A backend for an FFN's hard mode, with its weights.

    Args:
        choice: The backend, with the reason why it is not a faster one.
        weights: The weights for the backend; None if the modules themselves compute (dense-mask).
        routes: Whether the backend also makes the selector's mask, without scores.
        marks: The conditions of the choice, from `marks_of`.
        skipping: Whether the differentiable `run_skipping` computes wherever it is faster.
    """

    choice: Choice
    weights: ExpertWeights | QuantizedExperts | None = None
    routes: bool = False
    marks: tuple[Any, ...] = ()
    skipping: bool = False

    def takes(self, factor_BTE: torch.Tensor) -> bool:
        """Says whether `run` computes with these factors. Otherwise the modules do."""
        if not self.skipping or not isinstance(self.weights, ExpertWeights):
            return self.weights is not None
        kind = autocast_dtype(factor_BTE) or self.weights.up_ESD.dtype
        return factor_BTE.dtype == torch.bool and skips(factor_BTE.flatten(0, -2), kind)

    def run(self, x_BTD: torch.Tensor, mask_BTE: torch.Tensor) -> torch.Tensor:
        """Returns the output [B, T, D] of the experts that each token selected."""
        assert self.weights is not None
        backend = "skipping" if self.skipping else self.choice.backend
        flat_ND = run_experts(backend, x_BTD.flatten(0, -2), mask_BTE.flatten(0, -2), self.weights)
        return flat_ND.view(x_BTD.shape)


DENSE_MASK = Prepared(Choice("dense-mask"))


def marks_of(x: torch.Tensor, backend: Backend, expert_size: int, *modules: Any) -> tuple[Any, ...]:
    """Returns the conditions of a choice: the requested backend, the input's kind, the context of the call, modules."""
    return (
        backend,
        expert_size,
        type(x),
        x.dtype,
        x.device,
        autocast_dtype(x),
        has_global_hooks(),
        what_transforms(),
        *map(mark, modules),
    )


def prepare(
    parts: FfnParts,
    selector: Selector,
    expert_size: int,
    backend: Backend,
    x: torch.Tensor,
    gradient: bool = False,
    marks: tuple[Any, ...] = (),
) -> Prepared:
    """Chooses the backend for an FFN's hard mode on such an input.

    Args:
        parts: The FFN's current modules.
        selector: The selector of its experts.
        expert_size: S.
        backend: The requested backend.
        x: The input; its values do not matter.
        gradient: Whether the result must be differentiable.
        marks: The conditions of the choice, from `marks_of`.
    """
    if backend == "dense-mask":
        return DENSE_MASK
    if gradient:
        return Prepared(choose(backend, x, x, gradient=True))
    fallback = _why_not(parts, selector, x)
    if not fallback:
        quantised = isinstance(parts.up, QuantizedLinear)  # it takes inputs of any type
        choice = choose(backend, x, x if quantised else parts.up.weight)
        if choice.backend == "dense-mask":
            return Prepared(choice, marks=marks)
        try:
            weights = expert_weights(parts, expert_size)
            return Prepared(choice, weights, choice.backend == "triton" and routes(selector), marks)
        except UserError as error:
            fallback = str(error)
    return Prepared(Choice("dense-mask", fallback), marks=marks)


def prepare_skipping(parts: FfnParts, selector: Selector, expert_size: int, x: torch.Tensor) -> Prepared:
    """Chooses the backend of hard mode in training: `run_skipping` on a CPU, if it equals the modules."""
    up: Any = parts.up
    if isinstance(up, QuantizedLinear):  # it refuses to train
        return DENSE_MASK
    weight, mixed = up.weight, autocast_dtype(x)
    if x.device.type != "cpu" or _why_not(parts, selector, x) or (mixed is None and x.dtype != weight.dtype):
        return DENSE_MASK
    if runs_backward_hooks(parts.up, parts.gate, parts.down, parts.activation, parts.dropout):
        return DENSE_MASK
    try:
        return Prepared(DENSE_MASK.choice, expert_weights(parts, expert_size, in_place=False), skipping=True)
    except UserError:
        return DENSE_MASK


def _why_not(parts: FfnParts, selector: Selector, x: torch.Tensor) -> str:
    """Returns why the kernels would differ from the modules on this input, "" if they would not."""
    if type(x) not in TENSORS:
        return f"the input is a {type(x).__name__}"
    if has_global_hooks():
        return "hooks are registered for every module's forward"
    if why := what_transforms():
        return why
    for name in ("up", "gate", "down"):
        projection = getattr(parts, name)
        if projection is None:
            continue
        kind = "" if isinstance(projection, QuantizedLinear) else why_not_linear(projection)
        if why := kind or what_surrounds(projection):
            return f"its {name} projection {why}"
    if isinstance(parts.activation, nn.Module) and (why := what_surrounds(parts.activation)):
        return f"its activation {why}"
    if parts.dropout is not None:
        if parts.dropout.training:
            return "there is dropout between its projections, and the model is in train mode"
        if type(parts.dropout) not in (nn.Dropout, nn.Identity):  # one for Monte Carlo drops in evaluation, too
            return f"there is a {type(parts.dropout).__name__} between its projections"
        if why := what_surrounds(parts.dropout):
            return f"its dropout {why}"
    if selector.reads != "input":
        return f"{type(selector).__name__} reads activations of every neuron before it chooses"
    if selector.scales:
        return f"{type(selector).__name__} scales experts, which no sparse backend does"
    return ""


def routes(selector: Selector) -> bool:
    """Says whether the backend may bypass the selector and make the mask from its linear layer."""
    # peft wraps a module that it trains in full. Such a wrapper passes the attribute on, but its class lacks it.
    wrapped = not hasattr(selector.__class__, "linear") or what_surrounds(selector)
    linear = None if wrapped else selector.linear()
    return linear is not None and all(t is None or (type(t) in TENSORS and t.is_contiguous()) for t in linear)


def route(selector: Selector, threshold: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
    """Returns the mask [B, T, E] without scores, in one launch, on a backend that ``routes`` this selector."""
    linear = selector.linear()
    assert linear is not None
    mask_NE = run_router(x_BTD.flatten(0, -2), *linear, threshold)
    return mask_NE.view(*x_BTD.shape[:-1], -1)


def report(prepared: Prepared, backend: Backend) -> None:
    """Says in the log, once, why every expert is computed although a sparse backend was asked for."""
    if prepared.choice.fallback and not torch.compiler.is_compiling():
        say_once(f"backend {backend!r} computes every expert and masks (dense-mask): {prepared.choice.fallback}")

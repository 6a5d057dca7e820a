"""Store the weights of expert FFNs by expert, in place, and make views of them for the kernels."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.exact import why_not_linear
from lte_lightning.core.model.parts import FfnParts, Projection
from lte_lightning.core.model.quantized import QuantizedLinear
from lte_lightning.errors import UserError
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.quantized import QuantizedExperts

_FUNCTIONS = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
    activations.gelu: "gelu",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    BloomGelu: "gelu_tanh",
}


def activation_name(activation: Any) -> str | None:
    """Returns the kernels' name of an activation function or module; None if they do not have it."""
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, nn.Module):
        return _MODULES.get(type(activation)) if _calls_its_own(activation) else None
    return _FUNCTIONS.get(activation)


def _calls_its_own(activation: nn.Module) -> bool:
    """Says whether the function that an activation of transformers holds in ``act`` is the one of its class."""
    act: Any = getattr(activation, "act", functional.gelu)
    return functional.gelu in (act, getattr(act, "func", None)) or getattr(act, "__self__", None) is activation


@torch.inference_mode(False)  # inference tensors could not be trained afterwards
@torch.no_grad()
def lay_out(parts: FfnParts, by_neuron: bool) -> None:
    """Stores an FFN's weights with a row per neuron, for the sparse backends, or in its modules' original layout.

    It moves only whole weights of ordinary projections. A shard, a quantised weight or an adapter's weight stays as it
    is. The weight below an adapter goes back to its original layout, but never to a row per neuron.
    """
    for projection, rows_are_neurons in ((parts.up, True), (parts.gate, True), (parts.down, False)):
        if projection is None:
            continue
        modules: list[Any] = [projection] if by_neuron else list(projection.modules())
        for module in modules:
            if not why_not_linear(module):
                _store(module, by_neuron and _is_transposed(module, rows_are_neurons))


def _store(projection: Projection, transposed: bool) -> None:
    weight = projection.weight.data
    rows = weight.T if transposed else weight
    if rows.is_contiguous():
        return
    # Write into the memory that holds the weight, because a mapped file would stay in memory beside a new tensor.
    copy, held = rows.contiguous(), weight if transposed else weight.T
    stored = held.view(copy.shape).copy_(copy) if held.is_contiguous() else copy
    projection.weight.data = stored.T if transposed else stored


def _is_transposed(projection: nn.Module, rows_are_neurons: bool) -> bool:
    """Says whether a row of the weight is not a neuron, as in a Linear's down [D, F] and a Conv1D's up."""
    return isinstance(projection, Conv1D) == rows_are_neurons


def expert_weights(parts: FfnParts, expert_size: int, in_place: bool = True) -> ExpertWeights | QuantizedExperts:
    """Returns an FFN's weights by expert, views of its parameters.

    Args:
        parts: The FFN, its projections exactly ``Linear`` or ``Conv1D``, or all of them quantised.
        expert_size: S.
        in_place: Whether they must have the layout of `set_backend`; otherwise a row may have strides.

    Raises:
        UserError: If the kernels do not have its activation, or its weights and biases have several types or not the
            layout of `set_backend`.
    """
    name = activation_name(parts.activation)
    if name is None:
        raise UserError(f"no sparse backend has the activation {_describe(parts.activation)}")
    projections = [p for p in (parts.up, parts.gate, parts.down) if p is not None]
    up, gate, down = cast(tuple[Any, Any, Any], (parts.up, parts.gate, parts.down))
    if isinstance(up, QuantizedLinear) and isinstance(down, QuantizedLinear):
        up.require_evaluation(up.blocks)
        matrix, bias = (None, None) if gate is None else (gate.matrix, gate.bias)
        return QuantizedExperts(up.matrix, down.matrix, name, matrix, up.bias, bias, down.bias)
    types = {t.dtype for p in projections for t in (p.weight, p.bias) if t is not None}
    if len(types) > 1:  # T5 in float16
        listed = ", ".join(sorted(map(str, types)))
        raise UserError(f"its projections' weights and biases are of several types: {listed}")

    def by_expert(projection: Projection, rows_are_neurons: bool = True) -> torch.Tensor:
        weight = projection.weight
        rows_FD = weight.T if _is_transposed(projection, rows_are_neurons) else weight
        if in_place and not rows_FD.is_contiguous():
            raise UserError(
                "its weights are not stored a row per neuron: they are sharded, or were replaced after set_backend(); "
                "call it again"
            )
        return rows_FD.unflatten(0, (-1, expert_size))

    def bias_by_expert(projection: Projection) -> torch.Tensor | None:
        return None if projection.bias is None else projection.bias.unflatten(0, (-1, expert_size))

    return ExpertWeights(
        by_expert(parts.up),
        by_expert(parts.down, False),
        name,
        None if parts.gate is None else by_expert(parts.gate),
        bias_by_expert(parts.up),
        None if parts.gate is None else bias_by_expert(parts.gate),
        parts.down.bias,
    )


def _describe(activation: Any) -> str:
    return type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")

"""Expert FFNs on sparse backends: their weights by expert, in place, and which backend computes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers import activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.parts import Projection
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import BACKENDS, Backend, Choice, choose, run_experts, run_router, say_once
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.selection import Selector

if TYPE_CHECKING:
    from lte_lightning.core.model.experts import ExpertFfn

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
    """Returns the kernels' name of an activation function or module, None if they do not have it."""
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, nn.Module):
        return _MODULES.get(type(activation))
    return _FUNCTIONS.get(activation)


def set_backend(model: nn.Module, backend: Backend = "auto") -> None:
    """Chooses what computes the selected experts in hard mode when no gradient is wanted.

    For every backend but ``dense-mask`` the weights are laid out once, in place, a row per neuron: the down
    projection's parameter becomes a transposed view of that. Names, shapes and values stay, and with them state_dict,
    dense mode, training and saving; nothing is stored twice. ``dense-mask`` undoes it, as `restore` does: torch
    multiplies few tokens by transposed bfloat16 weights at two thirds of the speed.

    Args:
        model: A converted model.
        backend: ``auto`` (by device and type), ``dense-mask`` (every expert is computed, then masked), ``reference``
            (slow and plain), ``cpu`` or ``triton``. What a backend cannot serve, the dense-mask path does, and the log
            says so once.

    Raises:
        UserError: If there is no such backend, or the model was not converted.
    """
    from lte_lightning.core.model.convert import require_expert_ffns

    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    for ffn in require_expert_ffns(model).values():
        ffn.backend = backend
        lay_out(ffn, by_neuron=backend != "dense-mask")


@torch.inference_mode(False)  # what is made in it could not be trained afterwards
@torch.no_grad()
def lay_out(ffn: "ExpertFfn", by_neuron: bool) -> None:
    """Stores an FFN's weights a row per neuron, for the sparse backends, or as its modules have them from the start."""
    for projection, rows_are_neurons in ((ffn.up, True), (ffn.gate, True), (ffn.down, False)):
        if projection is None:
            continue
        transposed = by_neuron and _is_transposed(projection, rows_are_neurons)
        weight = projection.weight.data
        wanted = weight.T if transposed else weight
        if wanted.is_contiguous():
            continue
        # Written back into the memory that holds it: a file mapped into memory would stay there beside a new tensor.
        copy, held = wanted.contiguous(), weight if transposed else weight.T
        stored = held.view(copy.shape).copy_(copy) if held.is_contiguous() else copy
        projection.weight.data = stored.T if transposed else stored


def _is_transposed(projection: Projection, rows_are_neurons: bool) -> bool:
    """Says whether a row of the weight is no neuron: a Linear's down [D, F], a Conv1D's up."""
    return isinstance(projection, Conv1D) == rows_are_neurons


def expert_weights(ffn: "ExpertFfn") -> ExpertWeights:
    """Returns an FFN's weights by expert, views of its parameters.

    Raises:
        UserError: If the kernels do not have its activation, or its weights are not laid out as `set_backend` does.
    """
    name = activation_name(ffn.activation)
    if name is None:
        raise UserError(f"no sparse backend has the activation {_describe(ffn.activation)}")
    E, S = ffn.experts, ffn.expert_size

    def by_expert(projection: Projection, rows_are_neurons: bool = True) -> torch.Tensor:
        weight = projection.weight
        rows_FD = weight.T if _is_transposed(projection, rows_are_neurons) else weight
        if not rows_FD.is_contiguous():
            raise UserError("the weights were replaced after set_backend(); call it again")
        return rows_FD.view(E, S, -1)

    return ExpertWeights(
        by_expert(ffn.up),
        by_expert(ffn.down, False),
        name,
        None if ffn.gate is None else by_expert(ffn.gate),
        None if ffn.up.bias is None else ffn.up.bias.view(E, S),
        None if ffn.gate is None or ffn.gate.bias is None else ffn.gate.bias.view(E, S),
        ffn.down.bias,
    )


def _describe(activation: Any) -> str:
    return type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")


def _choose(ffn: "ExpertFfn", x_BTD: torch.Tensor) -> Choice:
    gradient = torch.is_grad_enabled() and (x_BTD.requires_grad or any(p.requires_grad for p in ffn.parameters()))
    return choose(ffn.backend, x_BTD, ffn.up.weight, gradient)


def choose_for(ffn: "ExpertFfn", x_BTD: torch.Tensor) -> tuple[Choice, ExpertWeights | None]:
    """Returns what computes an FFN's hard mode on this input, and its weights unless that is the dense-mask path."""
    choice = _choose(ffn, x_BTD)
    if choice.backend == "dense-mask":
        return choice, None
    if ffn.dropout is not None and ffn.training:
        fallback = "there is dropout between its projections, and the model is in train mode"
    elif ffn.selector.scales:
        fallback = f"{type(ffn.selector).__name__} scales experts, which no sparse backend does"
    elif len(types := _types(ffn)) > 1:  # T5 in float16
        fallback = f"its projections' weights and biases are of several types: {', '.join(sorted(map(str, types)))}"
    else:
        try:
            return choice, expert_weights(ffn)
        except UserError as error:
            fallback = str(error)
    return Choice("dense-mask", fallback), None


def _types(ffn: "ExpertFfn") -> set[torch.dtype]:
    tensors = [t for p in (ffn.up, ffn.gate, ffn.down) if p is not None for t in (p.weight, p.bias) if t is not None]
    return {tensor.dtype for tensor in tensors}


def route(ffn: "ExpertFfn", selector: Selector, x_BTD: torch.Tensor) -> torch.Tensor | None:
    """Returns the mask [B, T, E] of LTE's router where the triton backend makes it, without scores, in one launch.

    Args:
        ffn: The FFN that it is for.
        selector: The FFN's selector.
        x_BTD: Its input.

    Returns:
        True where a score exceeds the FFN's threshold; None where the selector is to be asked: on every other backend,
        where a gradient may be wanted, and of every other selector.
    """
    on_triton = x_BTD.is_cuda or ffn.backend == "triton"  # everywhere else this is all that it costs
    linear = selector.linear() if on_triton else None
    if linear is None or _choose(ffn, x_BTD).backend != "triton":
        return None
    mask_NE = run_router(x_BTD.flatten(0, -2), *linear, ffn.threshold)
    return mask_NE.view(*x_BTD.shape[:-1], -1)


def run_sparse(ffn: "ExpertFfn", x_BTD: torch.Tensor, mask_BTE: torch.Tensor) -> torch.Tensor | None:
    """Computes an FFN's hard mode on its backend; None if that is for the dense-mask path to do (the log says why)."""
    choice, weights = choose_for(ffn, x_BTD)
    if weights is not None:
        flat_ND = run_experts(choice.backend, x_BTD.flatten(0, -2), mask_BTE.flatten(0, -2), weights)
        return flat_ND.view(x_BTD.shape)
    if choice.fallback and not ffn.training and not torch.compiler.is_compiling():
        say_once(f"backend {ffn.backend!r} computes every expert and masks (dense-mask): {choice.fallback}")
    return None

"""The layout of an FFN's weights for the kernels: one contiguous block of rows per expert."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def hidden_activations(
    activation: Callable[[torch.Tensor], torch.Tensor], up: torch.Tensor, gate: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the activated half and the down projection's input. Only this function computes gate times up.

    Args:
        activation: The FFN's activation function.
        up: The up projection's output.
        gate: The gate projection's output; None for a plain FFN.

    Returns:
        ``activation(gate)`` and ``activation(gate) * up``. For a plain FFN both are ``activation(up)``.
    """
    if gate is None:
        hidden = activation(up)
        return hidden, hidden
    activated = activation(gate)
    return activated, activated * up


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one FFN by expert. They are views of the model's parameters if those have this layout.

    An expert's neurons are rows of every projection; for that, the down projection is stored transposed. So kernels
    read one expert's weights in one piece, and skip those of an unselected expert.

    Args:
        up_ESD: Up projection.
        down_ESD: Down projection, transposed.
        activation: A name in `ACTIVATIONS`.
        gate_ESD: Gate projection of a gated FFN, ``down(activation(gate(x)) * up(x))``.
        up_bias_ES: Bias of the up projection.
        gate_bias_ES: Bias of the gate projection.
        down_bias_D: Bias of the output, always added.
    """

    up_ESD: torch.Tensor
    down_ESD: torch.Tensor
    activation: str
    gate_ESD: torch.Tensor | None = None
    up_bias_ES: torch.Tensor | None = None
    gate_bias_ES: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        E, S, D = self.up_ESD.shape
        wanted = {
            "down_ESD": (E, S, D),
            "gate_ESD": (E, S, D),
            "up_bias_ES": (E, S),
            "gate_bias_ES": (E, S),
            "down_bias_D": (D,),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} as in up_ESD")
            if tensor is not None and tensor.dtype != self.up_ESD.dtype:
                raise ValueError(f"{name} is {tensor.dtype}, and up_ESD is {self.up_ESD.dtype}")

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        """Returns a copy in another type, or ``self`` if it has that type already."""
        if dtype == self.up_ESD.dtype:
            return self
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(dtype) for name, tensor in tensors.items()})

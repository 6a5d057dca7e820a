"""What a selector receives and returns: sizes, activations, options, and its description for reports."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Options(Protocol):
    """The fields of the configuration that a selector may read; `LteConfig` documents them."""

    selector: Any
    expert_size: int
    target_sparsity: float | None
    threshold: float
    router_bias: bool
    router_margin: float
    router_scale: float
    wanda_pattern: Any
    wanda_scope: Any


@dataclass(frozen=True)
class FfnShape:
    """Sizes of an FFN.

    Args:
        width: D.
        experts: E.
        gated: Whether it has a gate projection beside the up projection.
        activation: Name of its activation, such as ``relu``; None if the kernels have no name for it.
    """

    width: int
    experts: int
    gated: bool = False
    activation: str | None = None


@dataclass(frozen=True)
class ModelShape:
    """Facts of a whole model that a selector may check before conversion.

    Args:
        name: The model's class.
        model_type: Its family.
        stacks: 2 with an encoder and a decoder, else 1.
        ffn_inputs: Number of inputs of each projection of the FFNs.
        layer_inputs: Number of inputs of each projection of the layers, attention's too.
    """

    name: str
    model_type: str
    stacks: int
    ffn_inputs: tuple[int, ...]
    layer_inputs: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """An FFN's activations in the dense model on N real tokens.

    Args:
        x_ND: Its input.
        gate_NF: activation(gate(x)), or of a plain FFN activation(up(x)).
        hidden_NF: The input of the down projection.
        first_FD: The weights whose product with the input is activated: the gate's, or the up projection's.
        down_FD: The down projection's weights, a row per neuron.
    """

    x_ND: torch.Tensor
    gate_NF: torch.Tensor
    hidden_NF: torch.Tensor
    first_FD: torch.Tensor
    down_FD: torch.Tensor


class Ffn(Protocol):
    """An FFN that a selector may run while it is calibrated."""

    def dense(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the hidden activations [N, F] and the output [N, D] of the dense FFN."""

    def hard(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Returns the output [N, D] in hard mode, with the selector as it is now."""


@dataclass(frozen=True)
class Description:
    """A method's description for reports; it is saved with the model, so that a report needs no code of its author.

    Args:
        label: The method's name for people.
        caveat: Caveat shown beside the label; "" for none.
        rival: The name under which a report lists it as missing.
        learns_with_task: Whether the router stage trains the model's weights, too.
        scales: Whether an expert's output is multiplied by its score.
        graded: Whether scores are more than a yes or no.
        oracle: Whether it reads the activations that it saves, and so cannot run faster.
        prunes: Whether it removes weights for every token.
    """

    label: str
    caveat: str = ""
    rival: str = ""
    learns_with_task: bool = False
    scales: bool = False
    graded: bool = False
    oracle: bool = False
    prunes: bool = False

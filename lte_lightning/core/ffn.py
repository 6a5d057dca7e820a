"""The table of FFNs: for each model type, where its FFNs are and what their parts are called.

To support another family, add a row to `FFN_TABLE` and its tiny config to ``tests/core/conftest.py``.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.errors import UserError

Activation = Callable[[torch.Tensor], torch.Tensor]
Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class FfnRow:
    """Where one family keeps its FFNs; paths are relative to a transformer layer.

    Args:
        layers: Path of the list of layers inside ``model.base_model``.
        up: The up projection, D to F.
        down: The down projection, F to D.
        activation: The activation function.
        gate: The gate projection of a gated FFN, ``down(activation(gate(x)) * up(x))``.
        module: The FFN's own module, if it does nothing but the above; it is then replaced whole. Otherwise the expert
            FFN takes the place of the up projection, and activation and down projection become identities, so that the
            dropout, residual and LayerNorm around them stay where they were.
    """

    layers: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    module: str | None = None


_BERT = FfnRow("encoder.layer", "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")

FFN_TABLE: dict[str, FfnRow] = {
    "bert": _BERT,
    "roberta": _BERT,
    "mpnet": _BERT,
    "distilbert": FfnRow("transformer.layer", "ffn.lin1", "ffn.lin2", "ffn.activation"),
    "gpt2": FfnRow("h", "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "llama": FfnRow("layers", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj", module="mlp"),
}


class UnsupportedModelError(UserError):
    """The model's family, or one of its parts, is not one that expert FFNs are made for."""


@dataclass(frozen=True)
class FfnParts:
    """The modules that make one FFN."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation


def find_row(model_type: str) -> FfnRow:
    """Returns the table's row of a Hugging Face ``model_type``.

    Raises:
        UnsupportedModelError: If there is none.
    """
    if model_type not in FFN_TABLE:
        nearest = difflib.get_close_matches(model_type, FFN_TABLE, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; known are {', '.join(sorted(FFN_TABLE))}.{hint} "
            "To add one, describe its FFN in a row of FFN_TABLE (lte_lightning/core/ffn.py)."
        )
    return FFN_TABLE[model_type]


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the transformer layers of ``model``, in order."""
    row = find_row(model.config.model_type)
    try:
        return list(model.base_model.get_submodule(row.layers).children())
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} says it is a {model.config.model_type!r} but has no {row.layers!r}: {error}"
        ) from error


def find_parts(layer: nn.Module, row: FfnRow) -> FfnParts:
    """Returns the modules of a layer's FFN.

    Raises:
        UnsupportedModelError: If a part is missing, or a projection is neither ``Linear`` nor ``Conv1D`` (quantised
            weights, for instance).
    """

    def projection(path: str) -> Projection:
        module: Projection = get_child(layer, path)
        if type(module) not in (nn.Linear, Conv1D):
            raise UnsupportedModelError(
                f"{type(layer).__name__}.{path} is a {type(module).__name__}; only torch.nn.Linear and transformers' "
                "Conv1D can be cut into experts. Convert the model before quantising it or adding adapters."
            )
        return module

    gate = projection(row.gate) if row.gate else None
    return FfnParts(projection(row.up), gate, projection(row.down), get_child(layer, row.activation))


def weight_rows(projection: Projection) -> torch.Tensor:
    """Returns a projection's weight as [out, in], whatever way its class stores it (a view, no copy)."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def get_child(layer: nn.Module, path: str) -> Any:
    """Returns what stands at ``path`` below ``layer``: a module, or an activation function."""
    parent_path, _, name = path.rpartition(".")
    try:
        return getattr(layer.get_submodule(parent_path), name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {path!r}, though the table says so ({error}); already converted?"
        ) from error


def set_child(layer: nn.Module, path: str, value: object) -> None:
    """Puts ``value`` at ``path`` below ``layer``; a plain function may take a module's place and the reverse."""
    parent_path, _, name = path.rpartition(".")
    parent = layer.get_submodule(parent_path)
    if not isinstance(value, nn.Module):
        delattr(parent, name)  # torch lets no function take a module's place; modules keep it, and the weights' order
    setattr(parent, name, value)

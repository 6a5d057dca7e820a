"""Find, read and replace the parts of a model's FFNs by the names in `families`."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.exact import why_not_linear
from lte_lightning.core.model.families import FAMILIES, FfnRow, UnsupportedModelError, find_row
from lte_lightning.core.model.fused import halves

Activation = Callable[[torch.Tensor], torch.Tensor]
Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class FfnParts:
    """The modules of one FFN, and the table's row that names them."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation
    dropout: nn.Dropout | None
    row: FfnRow


def row_of(config: PreTrainedConfig) -> FfnRow:
    """Returns the table's row of a model.

    Raises:
        UnsupportedModelError: If its family is not in the table, or routes its FFNs already.
    """
    experts = next(_expert_counts(config.to_dict()), None)
    if experts:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is a mixture of experts already ({experts}): its FFNs are routed "
            "by what it was trained with. Start from a dense model of the same family"
        )
    text = getattr(config, "text_config", None)
    if text is not None and config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is multimodal; take its text model ({text.model_type!r}) out and "
            "convert that (docs/families.md says how)"
        )
    return find_row(config.model_type)


def find_stacks(model: PreTrainedModel) -> list[list[nn.Module]]:
    """Returns the transformer layers of each stack of ``model``: one, or the encoder's and the decoder's.

    Raises:
        UnsupportedModelError: If the family is not in the table, routes its FFNs already, or has other layers than the
            table says.
    """
    row, stacks, missing = row_of(model.config), [], None
    for path in row.layers:
        try:
            stacks.append(list(model.base_model.get_submodule(path).children()))
        except AttributeError as error:
            missing = missing or error
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} says it is a {model.config.model_type!r} but has no "
            f"{' or '.join(map(repr, row.layers))}: {missing}"
        ) from missing
    return stacks


def _expert_counts(config: dict[str, Any]) -> Iterator[str]:
    """Yields the settings for a mixture's number of experts, including those of nested configurations."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif re.search(r"(^|_)(num|n)_(\w+_)?experts$", str(key)) and isinstance(value, int) and value > 1:
            yield f"{key}={value}"


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the transformer layers of ``model``, in order, those of an encoder before those of its decoder."""
    return [layer for stack in find_stacks(model) for layer in stack]


def count_neurons(model: PreTrainedModel) -> int:
    """Returns the number of neurons of the first layer's FFN.

    Args:
        model: A plain model.

    Raises:
        UnsupportedModelError: If the model's family, or the type of a projection, is unknown.
    """
    return weight_rows(find_parts(find_layers(model)[0], find_row(model.config.model_type)).up).shape[0]


def find_parts(layer: nn.Module, row: FfnRow) -> FfnParts:
    """Returns the modules of a layer's FFN.

    Raises:
        UnsupportedModelError: If a part is missing, or a projection is neither ``Linear`` nor ``Conv1D`` (quantised
            weights, for instance).
    """
    if row.otherwise and not _has_child(layer, row.up):
        row = row.otherwise

    def projection(path: str) -> Projection:
        module: Projection = get_child(layer, path)
        if why := why_not_linear(module):
            raise UnsupportedModelError(
                f"{type(layer).__name__}.{path} {why}; only torch.nn.Linear and transformers' Conv1D with weights of "
                "their own can be cut into experts. Convert the model before quantising it or adding adapters."
            )
        return module

    dropout = get_child(layer, row.dropout) if row.dropout else None
    if not (dropout is None or isinstance(dropout, nn.Dropout)):
        dropout = nn.Dropout(dropout)
    gate = projection(row.gate) if row.gate else None
    up, down = projection(row.up), projection(row.down)
    if row.fused:
        gate, up = halves(cast(nn.Linear, up))
    return FfnParts(up, gate, down, get_child(layer, row.activation), dropout, row)


def weight_rows(projection: Projection) -> torch.Tensor:
    """Returns a projection's weight as [out, in], however its class stores it (a view, no copy)."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def get_child(layer: nn.Module, path: str) -> Any:
    """Returns the attribute at ``path`` below ``layer``: a module, an activation function, or a setting."""
    parent_path, _, name = path.rpartition(".")
    try:
        return getattr(_parent(layer, parent_path), name)
    except (AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {path!r}, though the table says so ({error}); already converted?"
        ) from error


def set_child(layer: nn.Module, path: str, value: object) -> None:
    """Puts ``value`` at ``path`` below ``layer``. A plain function may replace a module, and a module a function."""
    parent_path, _, name = path.rpartition(".")
    parent = _parent(layer, parent_path)
    if not isinstance(value, nn.Module):
        # torch lets no function replace a module. A module needs no removal, and so keeps its place among the weights.
        delattr(parent, name)
    setattr(parent, name, value)


def _has_child(layer: nn.Module, path: str) -> bool:
    parent_path, _, name = path.rpartition(".")
    return hasattr(_parent(layer, parent_path), name)


def _parent(layer: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        layer = layer[-1] if name == "-1" else layer.get_submodule(name)  # type: ignore[index]
    return layer

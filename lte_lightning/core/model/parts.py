"""The table of FFNs: for each model type, where its FFNs are and what their parts are called.

To support another family, add a row to `FFN_TABLE`, its tiny config to ``tests/core/conftest.py`` and its examples to
``families.py``, which makes the page that lists them.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.fused import halves
from lte_lightning.errors import UserError

Activation = Callable[[torch.Tensor], torch.Tensor]
Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class FfnRow:
    """Where one family keeps its FFNs; paths are relative to a transformer layer, -1 is the last of a list.

    Args:
        layers: Paths of the lists of layers inside ``model.base_model``; the encoder's, then the decoder's, where the
            family has both (a model may lack one of them).
        up: The up projection, D to F.
        down: The down projection, F to D.
        activation: The activation function.
        gate: The gate projection of a gated FFN, ``down(activation(gate(x)) * up(x))``. The same path as ``up`` if one
            projection holds both, the rows of the gate before those of the up projection; such a row needs ``module``.
        module: The FFN's own module, if it does nothing but the above; it is then replaced whole. Otherwise the expert
            FFN takes the place of the up projection, and activation and down projection become identities, so that the
            dropout, residual and LayerNorm around them stay where they were.
        dropout: Dropout between activation and down projection, which the expert FFN then does: a part of ``module``,
            or a probability on the layer.
        otherwise: The row of a layer that has no ``up``.
    """

    layers: tuple[str, ...]
    up: str
    down: str
    activation: str
    gate: str | None = None
    module: str | None = None
    dropout: str | None = None
    otherwise: "FfnRow | None" = None

    @property
    def fused(self) -> bool:
        """Whether one projection holds gate and up."""
        return self.gate == self.up


_BERT = FfnRow(("encoder.layer",), "intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_LLAMA = FfnRow(("layers",), "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", gate="mlp.gate_proj", module="mlp")
_FALCON = FfnRow(("h",), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act", module="mlp")
_T5 = FfnRow(
    ("encoder.block", "decoder.block"),
    "layer.-1.DenseReluDense.wi",
    "layer.-1.DenseReluDense.wo",
    "layer.-1.DenseReluDense.act",
    module="layer.-1.DenseReluDense",
    dropout="layer.-1.DenseReluDense.dropout",
)
_T5_GATED = replace(_T5, up="layer.-1.DenseReluDense.wi_1", gate="layer.-1.DenseReluDense.wi_0")

FFN_TABLE: dict[str, FfnRow] = {
    "bart": FfnRow(("encoder.layers", "decoder.layers"), "fc1", "fc2", "activation_fn", dropout="activation_dropout"),
    "bert": _BERT,
    "bloom": FfnRow(("h",), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.gelu_impl"),
    "deberta-v2": _BERT,
    "distilbert": FfnRow(("transformer.layer",), "ffn.lin1", "ffn.lin2", "ffn.activation"),
    "electra": _BERT,
    "falcon": _FALCON,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": FfnRow(("h",), "mlp.c_fc", "mlp.c_proj", "mlp.act"),
    "gpt_neox": replace(_FALCON, layers=("layers",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "modernbert": FfnRow(("layers",), "mlp.Wi", "mlp.Wo", "mlp.act", gate="mlp.Wi", module="mlp", dropout="mlp.drop"),
    "mpnet": _BERT,
    "opt": FfnRow(("decoder.layers",), "fc1", "fc2", "activation_fn"),
    "phi3": FfnRow(
        ("layers",),
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "mlp.activation_fn",
        gate="mlp.gate_up_proj",
        module="mlp",
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": replace(_T5, otherwise=_T5_GATED),
}


class UnsupportedModelError(UserError):
    """The model's family, or one of its parts, is not one that expert FFNs are made for."""


@dataclass(frozen=True)
class FfnParts:
    """The modules that make one FFN, and the row that they were found by."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation
    dropout: nn.Dropout | None
    row: FfnRow


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
            "To add one, describe its FFN in a row of FFN_TABLE (lte_lightning/core/model/parts.py)."
        )
    return FFN_TABLE[model_type]


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
    if text is not None and config.model_type not in FFN_TABLE:
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
    """Yields the settings that give a mixture of experts its number of experts, those of nested configurations too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif re.search(r"(^|_)(num|n)_(\w+_)?experts$", str(key)) and isinstance(value, int) and value > 1:
            yield f"{key}={value}"


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the transformer layers of ``model``, in order, those of an encoder before those of its decoder."""
    return [layer for stack in find_stacks(model) for layer in stack]


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
        # Falcon's own Linear differs in rounding alone: it adds the bias after the product is rounded
        if type(module) not in (nn.Linear, Conv1D) and type(module).__name__ != "FalconLinear":
            raise UnsupportedModelError(
                f"{type(layer).__name__}.{path} is a {type(module).__name__}; only torch.nn.Linear and transformers' "
                "Conv1D can be cut into experts. Convert the model before quantising it or adding adapters."
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
    """Returns a projection's weight as [out, in], whatever way its class stores it (a view, no copy)."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def get_child(layer: nn.Module, path: str) -> Any:
    """Returns what stands at ``path`` below ``layer``: a module, an activation function, or a setting."""
    parent_path, _, name = path.rpartition(".")
    try:
        return getattr(_parent(layer, parent_path), name)
    except (AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {path!r}, though the table says so ({error}); already converted?"
        ) from error


def set_child(layer: nn.Module, path: str, value: object) -> None:
    """Puts ``value`` at ``path`` below ``layer``; a plain function may take a module's place and the reverse."""
    parent_path, _, name = path.rpartition(".")
    parent = _parent(layer, parent_path)
    if not isinstance(value, nn.Module):
        delattr(parent, name)  # torch lets no function take a module's place; modules keep it, and the weights' order
    setattr(parent, name, value)


def _has_child(layer: nn.Module, path: str) -> bool:
    parent_path, _, name = path.rpartition(".")
    return hasattr(_parent(layer, parent_path), name)


def _parent(layer: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        layer = layer[-1] if name == "-1" else layer.get_submodule(name)  # type: ignore[index]
    return layer

"""Whole models, head included: a dense model, its sparse twin, and texts to run them on."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lte_lightning.bench.decoding import sparse_twin
from lte_lightning.bench.machine import moved
from lte_lightning.bench.subject import SHAPES
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.convert import restore
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.core.model.folder import find, find_model, is_lte, read_description, said_of
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.core.model.quantize import QUANTIZATIONS
from lte_lightning.errors import UserError, meant
from lte_lightning.export.graph import Graph
from lte_lightning.kernels.dispatch import Backend

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TYPES = (*DTYPES, *QUANTIZATIONS)
VOCABULARIES = {"llama": 32000, "roberta": 50265}  # of the named shapes, with a head
TEXT = (
    "The ship left the harbour before dawn, and by noon the coast was a thin grey line behind it. Nobody on board "
    "spoke of the storm that had been promised for the evening. The cook counted his potatoes, the captain read old "
    "letters, and two children drew whales with chalk on the deck until a sailor told them how large a whale really "
    "is. "
)


@dataclass(frozen=True)
class Whole:
    """A model to measure with its head.

    Args:
        name: Its folder, hub id, or the name of a shape.
        dense: The plain model, in evaluation mode, in float32 and on the CPU.
        make: Makes its sparse twin in one of `TYPES`.
        tokenizer: The model's tokenizer, or None.
        trained: Whether the twin's routers were trained; if not, their biases must be set.
        decodes: Whether it generates text.
    """

    name: str
    dense: PreTrainedModel
    make: Callable[[str], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase | None
    trained: bool
    decodes: bool

    def plain(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """Returns a copy of the dense model in a type."""
        return moved(typed_copy(self.dense, dtype), device)

    def batch(self, sequences: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns inputs [B, T] from a fixed text, without padding; each sequence begins at another place of the text.

        Raises:
            UserError: If the model has too few positions.
        """
        config = self.dense.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit and length > limit - 2:
            raise UserError(f"{self.name} has positions for {limit - 2} tokens, and --tokens asks for {length}")
        if self.tokenizer is None:
            generator = torch.Generator().manual_seed(0)
            ids_BT = torch.randint(config.vocab_size // 2, config.vocab_size, (sequences, length), generator=generator)
        else:
            ids = self.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
            ids_BT = torch.tensor([[ids[(7 * b + t) % len(ids)] for t in range(length)] for b in range(sequences)])
        ids_BT = ids_BT.to(device)
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if "token_type_ids" in Graph(self.dense).inputs:
            batch["token_type_ids"] = torch.zeros_like(ids_BT)
        return batch


def typed_copy(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Returns a copy of a plain model in another type, without a copy in its own type in between."""
    weights = itertools.chain(model.parameters(), model.buffers())
    copied: dict[int, Any] = {id(weight): _in_type(weight, DTYPES[dtype]) for weight in weights}
    twin = copy.deepcopy(model, copied)
    twin.config.dtype = DTYPES[dtype]
    return twin


def _in_type(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = weight.detach().to(dtype if weight.is_floating_point() else weight.dtype, copy=True)
    return torch.nn.Parameter(values, weight.requires_grad) if isinstance(weight, torch.nn.Parameter) else values


def find_whole(shape: str, layers: int | None, backend: Backend) -> Whole:
    """Loads the dense model of a saved LTE model, a run, or a plain folder or hub id; or makes that of a named shape.

    Args:
        shape: Folder, hub id, or the name of a shape.
        layers: Layers of a named shape.
        backend: Backend of the sparse twin.

    Raises:
        UserError: If there is no such model, all of its experts run, or it is an encoder-decoder.
    """
    if shape in SHAPES:
        return _named(shape, layers)
    if layers is not None:
        raise UserError(f"--layers {layers} is for named shapes; {shape} is measured with all its layers")
    if "/" not in shape and not Path(shape).exists():
        near = meant(shape, SHAPES) or f"; there are the shapes {', '.join(SHAPES)}"
        raise UserError(f"no folder {shape}, and no shape of that name{near}")
    source = find_model(shape)
    tokenizer = None
    if any(find(source, name) for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not is_lte(source):
        with said_of(shape):
            config = AutoConfig.from_pretrained(source)
            _require_measurable(shape, config)
            name = (config.architectures or ["none"])[0]
            kind = getattr(transformers, name, None)
            if kind is None:
                raise UserError(f"{shape} was saved as {name!r}, which transformers lacks")
            dense = kind.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
        return Whole(shape, dense, lambda kind: _twin(dense, kind, backend), tokenizer, False, _decodes(dense))
    description = read_description(source)
    if description.get("quantized"):
        raise UserError(
            f"{shape} was saved quantised, so its dense model is gone; name the folder that it was quantised from"
        )
    if (mode := description["mode"]) != "hard":
        raise UserError(
            f"{shape} was saved in mode {mode!r}, in which every expert runs; name a model of the expert stage"
        )
    dense = restore(from_pretrained(source, dtype=torch.float32, backend="dense-mask")).eval().requires_grad_(False)
    _require_measurable(shape, dense.config)

    def make(kind: str) -> PreTrainedModel:
        quantize = next((known for known in QUANTIZATIONS if known == kind), None)
        dtype = torch.bfloat16 if quantize else DTYPES[kind]
        return from_pretrained(source, dtype=dtype, backend=backend, quantize=quantize).eval().requires_grad_(False)

    return Whole(shape, dense, make, tokenizer, True, _decodes(dense))


def _require_measurable(shape: str, config: Any) -> None:
    if config.is_encoder_decoder:
        raise UserError(f"{shape} is an encoder-decoder; only encoders and decoders can be measured as whole models")
    if config.model_type not in FAMILIES:
        raise UserError(f"{shape} is a {config.model_type} model; supported are {', '.join(FAMILIES)}")


def _decodes(model: PreTrainedModel) -> bool:
    kind = FAMILIES[model.config.model_type].kind
    is_decoder = kind == "decoder" or bool(getattr(model.config, "is_decoder", False))
    return is_decoder and model.get_output_embeddings() is not None


def _named(shape: str, layers: int | None) -> Whole:
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.vocab_size = VOCABULARIES[config.model_type]
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if config.model_type == "llama" else AutoModelForSequenceClassification
    dense = auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    return Whole(shape, dense, lambda kind: _twin(dense, kind, "auto"), None, False, _decodes(dense))


def _twin(dense: PreTrainedModel, kind: str, backend: Backend) -> PreTrainedModel:
    twin = sparse_twin(typed_copy(dense, "bf16" if kind in QUANTIZATIONS else kind), kind).eval().requires_grad_(False)
    if backend != "auto":
        set_backend(twin, backend)
    return twin

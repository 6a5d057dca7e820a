"""Models without weights, for counting: built on the meta device from a configuration alone."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.folder import is_lte, read_lte_config
from lte_lightning.core.model.parts import row_of
from lte_lightning.errors import UserError, meant_path


def skeleton(source: str | os.PathLike[str], expert_size: int | None = None) -> PreTrainedModel:
    """Builds a converted model on the meta device; no weight is read or made.

    Args:
        source: A model's folder, a hub id, or a ``config.json``. A saved LTE model keeps its own experts and selector.
        expert_size: Neurons per expert of a plain model; the paper's 32 if not given.

    Raises:
        UserError: If there is no such model, its family is not in the FFN table, the expert size does not divide the
            FFN width, or is given for a saved LTE model.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{source} has no config.json, so it is no Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if path.exists():
            raise UserError(f"cannot read the model configuration {source}: {error}") from error
        raise UserError(
            f"no folder or file {source}{meant_path(source)}, and no model of that name in the cache or on the hub "
            f"({_first_line(error)})"
        ) from error
    row_of(config)  # before anything of an unknown family is built
    lte = LteConfig(expert_size=32 if expert_size is None else expert_size)
    if not path.is_file() and is_lte(source):
        lte = read_lte_config(source)
        if expert_size not in (None, lte.expert_size):
            raise UserError(
                f"{source} is an LTE model with experts of {lte.expert_size} neurons; leave the expert size out, or "
                "count the plain model it was made from"
            )
    with torch.device("meta"):
        return convert(_build(config), lte, progress=False, group=False)


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model on the meta device, for counting what it was."""
    held = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): _empty(tensor) for tensor in held})


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    """The class that the configuration names; where it names none, the family's own language model."""
    model: PreTrainedModel
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        model = named(config)
        return model
    auto_class: Any = AutoModel
    if config.is_encoder_decoder:
        auto_class = AutoModelForSeq2SeqLM
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        auto_class = AutoModelForMaskedLM
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto_class = AutoModelForCausalLM
    model = auto_class.from_config(config)
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")

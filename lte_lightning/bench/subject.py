"""The measured pair: a dense model, and its sparse twin in which a set share of the experts runs."""

import copy
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedModel, RobertaConfig

from lte_lightning.bench.machine import cache_bytes, moved
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, restore
from lte_lightning.core.model.experts import ExpertFfn, expert_ffns, set_mode
from lte_lightning.core.model.families import FAMILIES, find_row
from lte_lightning.core.model.loading import from_pretrained, is_lte, read_lte_config
from lte_lightning.core.model.parts import find_layers, find_parts
from lte_lightning.core.model.prepared import prepare, route
from lte_lightning.errors import UserError
from lte_lightning.kernels import hidden_activations
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.selection import Selector, selector_class, selector_names

# Vocabularies are small: no measurement here includes the head, and the embedding is only a look-up.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=256),
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=256,
    ),
    "roberta-base": RobertaConfig(vocab_size=256, max_position_embeddings=514),
}
# "mixed" is trainer.precision bf16-mixed: float32 weights under autocast.
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "mixed": torch.float32}
POOL = 16  # masks per sparsity; one is drawn for each call


class ForcedSelector(Selector):
    """Runs the router, as the FFN would, then returns prepared scores in its place, different ones at each call."""

    def __init__(self, ffn: ExpertFfn, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = ffn.selector.to(dtype)
        self.ffn = (ffn,)  # in a tuple: its weights are not registered twice
        self.pool: list[torch.Tensor] = []
        self.routes: dict[Backend, bool] = {}  # whether the backend makes the router's mask
        self.calls = 0

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns scores [B, T, E] of 0 and 1, or [B * T, E] if the model flattens its tokens (OPT)."""
        (ffn,) = self.ffn
        if ffn.backend not in self.routes:
            prepared = prepare(ffn.parts, self.router, ffn.expert_size, ffn.backend, x_BTD)
            self.routes[ffn.backend] = prepared.routes
        if self.routes[ffn.backend]:
            route(self.router, ffn.tau, x_BTD)
        else:
            self.router(x_BTD)
        self.calls += 1
        return self.pool[self.calls % len(self.pool)].view(*x_BTD.shape[:-1], -1)

    def flops_per_token(self) -> int:
        """Returns the router's FLOPs."""
        return self.router.flops_per_token()


@dataclass
class Subject:
    """A dense model and its sparse twin, each with its own weights.

    Args:
        name: Name of the shape, or the folder.
        dense: The model of transformers, without a head.
        sparse: The converted model, in hard mode, on a backend.
        layers: Number of measured layers.
    """

    name: str
    dense: PreTrainedModel
    sparse: PreTrainedModel
    layers: int

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        return self.dense.device

    @property
    def ffns(self) -> list[ExpertFfn]:
        """The sparse twin's FFNs."""
        return list(expert_ffns(self.sparse).values())

    @property
    def is_decoder(self) -> bool:
        """Whether the model generates token by token."""
        kind = FAMILIES[self.dense.config.model_type].kind
        if kind == "encoder-decoder":
            return False  # its two stacks are measured together
        return kind == "decoder" or bool(getattr(self.dense.config, "is_decoder", False))

    @property
    def longest(self) -> float:
        """Number of learned positions; infinite if positions are not learned."""
        for name, module in self.dense.named_modules():
            if isinstance(module, nn.Embedding) and re.search("position|wpe", name):
                padding = -1 if module.padding_idx is None else module.padding_idx
                return int(module.num_embeddings) - int(getattr(module, "offset", padding + 1))
        return math.inf

    def force(self, batch: int, length: int, sparsity: float, generator: torch.Generator) -> None:
        """Prepares masks with which each token skips this share of the experts, independently of other tokens."""
        for ffn, forced in zip(self.ffns, self.forced, strict=True):
            active = round((1.0 - sparsity) * ffn.experts)
            order_PBTE = torch.rand(POOL, batch, length, ffn.experts, generator=generator).argsort(dim=-1)
            forced.pool = list((order_PBTE < active).to(self.device))

    @property
    def forced(self) -> list[ForcedSelector]:
        """The selectors of the measured FFNs."""
        return [cast(ForcedSelector, ffn.selector) for ffn in self.ffns]


def make_subject(
    shape: str,
    dtype: torch.dtype,
    backend: Backend,
    layers: int | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - it cannot be changed
) -> Subject:
    """Builds both models without a head: experts do not make the head faster, and named shapes have none.

    Args:
        shape: A name in `SHAPES` (random weights), or a folder or hub id of a saved LTE model.
        dtype: Type of weights and input.
        backend: Backend of the sparse twin.
        layers: Number of layers; by default enough that the FFN weights fill the cache eight times, at least two and
            at most all.
        device: Device of both models.

    Raises:
        UserError: If the shape is unknown, or the model selects in a way that no sparse backend makes faster.
    """
    if shape in SHAPES:
        config = copy.deepcopy(SHAPES[shape])
        per_layer = (3 if find_row(config.model_type).gate else 2) * config.hidden_size * config.intermediate_size
        enough = math.ceil(8 * cache_bytes(device) / (per_layer * dtype.itemsize))
        config.num_hidden_layers = layers or min(max(enough, 2), config.num_hidden_layers)
        with device:
            dense = AutoModel.from_config(config, dtype=dtype)
        lte = LteConfig(grouping="contiguous")
    elif os.path.isdir(shape) or (shape.count("/") == 1 and not shape.startswith((".", "/", "~"))):
        if not is_lte(shape):
            raise UserError(f"{shape} is not a saved LTE model; make one with fit, or name {', '.join(SHAPES)}")
        if layers is not None:
            raise UserError(f"--layers {layers} is for named shapes; {shape} is measured with all its layers")
        lte = read_lte_config(shape)
        _check_selector(shape, lte.selector)
        dense = moved(_without_head(restore(from_pretrained(shape, dtype=dtype, backend="dense-mask"))), device)
    else:
        raise UserError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}, or give a converted model's folder")
    dense = dense.eval().requires_grad_(False)
    sparse = convert(copy.deepcopy(dense), lte, progress=False, group=False).requires_grad_(False)
    for ffn in expert_ffns(sparse).values():
        ffn.selector = ForcedSelector(ffn, dtype)
    set_mode(sparse, "hard")
    set_backend(sparse, backend)
    return Subject(shape, dense, sparse, len(expert_ffns(sparse)))


def _check_selector(shape: str, name: str) -> None:
    def wrong(kind: type[Selector]) -> str:
        if kind.reads != "input":
            return "reads the activations of all neurons before it chooses, so every expert is computed"
        if kind.scales:
            return "scales the experts' outputs, which no sparse backend does, so every expert is computed"
        return "sets weights to 0 and runs every expert" if kind.calibration == "pruning" else ""

    if why := wrong(selector_class(name)):
        can = [other for other in selector_names() if other != "none" and not wrong(selector_class(other))]
        raise UserError(
            f"{shape} selects by {name!r}, which {why}, and no time is saved. Name a model that selects by "
            f"{', '.join(can)}, or a shape ({', '.join(SHAPES)}); to time this model as it is, set run.latency_rows "
            "in a fit"
        )


def _without_head(model: PreTrainedModel) -> PreTrainedModel:
    body = model.base_model
    assert isinstance(body, PreTrainedModel)
    if body is model and model.get_output_embeddings() is not None:  # T5's head is beside its two stacks
        model.set_output_embeddings(nn.Identity())
    return body


def dense_blocks(subject: Subject) -> Iterator[nn.Module]:
    """Yields each layer's dense FFN, on the dense model's own modules."""
    row = find_row(subject.dense.config.model_type)
    for layer in find_layers(subject.dense):
        yield DenseFfn(find_parts(layer, row))


class DenseFfn(nn.Module):
    """An FFN as the model itself computes it."""

    def __init__(self, parts) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.up, self.gate, self.down, self.activation = parts.up, parts.gate, parts.down, parts.activation
        self.casts = self.up.weight.dtype != self.down.weight.dtype

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the FFN's output [B, T, D]."""
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        _, hidden_BTF = hidden_activations(self.activation, self.up(x_BTD), gate_BTF)
        # T5 keeps its down projections in float32; other models have a single type, or autocast's
        return self.down(hidden_BTF.float() if self.casts else hidden_BTF)

"""Decode with a quantised LLaMA-like model, with one call of the kernels for each token."""

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lte_lightning.core.model.exact import TENSORS, has_global_hooks, what_transforms
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.fusable import decoder_of, why_not_fused
from lte_lightning.core.model.quantized import QuantizedEmbedding
from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.decoder import run_decoder
from lte_lightning.kernels.dispatch import say_once

MOST_SEQUENCES = 16  # for more, the ordinary modules share out more of the work


@contextmanager
def fused_decoding(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lets a quantised model decode faster on a CPU.

    >>> with fused_decoding(model):
    ...     model.generate(**inputs, cache_implementation="static")

    In this context the model computes one new token of up to 16 sequences in one call of the CPU kernels, if it has a
    cache (growing or static). Prompts, and calls that ask for more than logits, run as before. A model that was changed
    meanwhile (hooks, adapters, other modes) also runs as before, and the log says so. Each text begins with a check for
    such changes. If a module or a weight is replaced between two tokens of a text, a check notices it some tokens
    later. You may set thresholds, and write weights in place, at any time. Logits differ from the ordinary logits by
    the order of sums.

    Args:
        model: A model of the families LLaMA, Mistral without a sliding window, Qwen2 or Qwen3. It is converted with
            linear sigmoid routers, quantised, in hard mode, and in evaluation.

    Raises:
        UserError: If the model does not fit; `why_not_fused` says why.
    """
    if why := why_not_fused(model):
        raise UserError(f"this {type(model).__name__} cannot decode fused: {why}")
    steps = _Steps(model)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = steps.take(*args, **kwargs)
        return type(model).forward(model, *args, **kwargs) if outputs is None else outputs

    model.forward = forward
    try:
        yield model
    finally:
        del model.forward


class _Watch:
    """Says whether modules that a step bypasses would still compute the same. Values of their weights may change."""

    def __init__(self, modules: list[nn.Module], ffn: ExpertFfn | None = None) -> None:
        self.ffn, self.activation = ffn, None if ffn is None else ffn.activation
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.own = [module.__dict__ for module in modules]
        self.held: list[Any] = [held for m in modules for held in (m._modules, m._parameters, m._buffers) if held]
        self.kept = [value for held in self.held for value in held.values()]  # so that no other object gets its id
        self.tensors = [value for value in self.kept if isinstance(value, torch.Tensor)]
        self.before = self._marks()

    def _marks(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self.held))), *map(torch.Tensor.data_ptr, self.tensors)]

    def same(self) -> bool:
        if (ffn := self.ffn) is not None:
            if ffn.mode != "hard" or ffn.recorder is not None or ffn.backend not in ("auto", "cpu"):
                return False
            if ffn.activation is not self.activation:
                return False
        return not any(self.hooks) and not any("forward" in own for own in self.own) and self._marks() == self.before


class _Steps:
    """Computes one token of each sequence. The caller has checked that the model fits."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, model.model
        layers = self.base.layers
        self.dtype = self.base.norm.weight.dtype
        self.decoder = decoder_of(model)
        self.table = self.decoder.table()
        embedding: Any = self.base.embed_tokens
        self.tied = type(embedding) is QuantizedEmbedding and embedding.head[0] is model.lm_head
        # The step calls all other modules, so that what was added to these takes effect.
        alone = [self.base, layers, self.base.norm, model.lm_head, *([embedding] if self.tied else [])]
        self.watches = [_Watch(alone), *(_Watch(list(layer.modules()), layer.mlp) for layer in layers)]
        self.cache: list[torch.Tensor] = []  # keys and values of the current text, and lengths of a static cache
        self.next = self.hooks = self.turn = -1

    def take(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast | None:
        """Computes a forward call if it is for one token of each sequence; else returns None."""
        expected, self.next = self.next, -1
        if type(input_ids) not in TENSORS or input_ids.shape[1:] != (1,) or past_key_values is None:
            return None
        more = not others.pop("return_dict", True) or any(map(bool, others.values()))
        if more or not isinstance(logits_to_keep, int):
            return None
        if inputs_embeds is not None or labels is not None or len(input_ids) > MOST_SEQUENCES:
            return None
        N, position = len(input_ids), _position(past_key_values, len(self.decoder.layers))
        if position is None:
            return None
        if not self._unchanged(position == expected):
            say_once("the model was changed within fused_decoding(), and decodes the ordinary way")
            return None
        if isinstance(attention_mask, dict) and len(attention_mask) == 1:  # by kind of layer
            attention_mask = attention_mask.get("full_attention", attention_mask)
        mask_NT = _places_seen(attention_mask, N, position)
        if mask_NT is None and attention_mask is not None:
            return None
        ids = input_ids[:, 0].tolist() if self.tied else None
        if ids and not 0 <= min(ids) <= max(ids) < self.model.lm_head.out_features:
            return None
        x_ND = torch.empty(N, self.model.lm_head.in_features, dtype=self.dtype) if ids else self._embed(input_ids)
        if x_ND.dtype != self.dtype or not self._has_room(past_key_values, N, position):
            return None
        if position_ids is None:
            position_ids = torch.tensor([[position]])
        cos, sin = (part.expand(N, -1, -1).contiguous() for part in self.base.rotary_emb(x_ND, position_ids))
        places = self.cache[0].shape[2]
        logits_NV = run_decoder(self.decoder, self.table, x_ND, ids, (cos, sin), places, position, mask_NT)
        self.next = position + 1
        return CausalLMOutputWithPast(logits=logits_NV.unsqueeze(1), past_key_values=past_key_values)

    def _embed(self, ids_N1: torch.Tensor) -> torch.Tensor:
        return self.base.embed_tokens(ids_N1)[:, 0].contiguous()

    def _unchanged(self, goes_on: bool) -> bool:
        """Says whether the step computes the same as the model.

        It checks everything when a text begins, or when a hook was registered anywhere. Within a text it checks a part
        at each token, because data that a step does not touch are out of the processor's cache. A check of everything
        takes a tenth of the step.
        """
        if self.model.training or has_global_hooks() or what_transforms() or is_in_torch_dispatch_mode():
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if goes_on and self.hooks == RemovableHandle.next_id:
            self.turn = (self.turn + 1) % len(self.watches)
            return self.watches[self.turn].same() and self.watches[1].same()
        self.hooks = RemovableHandle.next_id
        return all(watch.same() for watch in self.watches)

    def _has_room(self, cache: Any, N: int, position: int) -> bool:
        """Gives the token a place in each layer's keys and values. Returns False if they are not plain enough."""
        tensors: list[Any] = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        lengths: list[Any] = []
        if isinstance(cache, StaticCache):
            lengths = [layer.cumulative_length for layer in cache.layers]  # type: ignore[union-attr]
        held = [*tensors, *lengths]
        if not lengths or len(self.cache) != len(held) or not all(map(operator.is_, held, self.cache)):
            self.cache = []
            _, heads, H = self.decoder.heads
            for each in tensors:
                if type(each) not in TENSORS or each.dtype != self.dtype or each.device.type != "cpu":
                    return False
                if each.shape != (N, heads, tensors[0].shape[2], H) or not each.is_contiguous():
                    return False
            if not lengths:
                new = torch.empty(N, heads, 1, H, dtype=self.dtype)
                for layer in cache.layers:
                    layer.keys = torch.cat((layer.keys, new), dim=2)
                    layer.values = torch.cat((layer.values, new), dim=2)
                tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
            self.table[:-1, -3:-1] = torch.tensor([each.data_ptr() for each in tensors]).view(-1, 2)
            self.table[:-1, -1] = torch.tensor([each.data_ptr() for each in lengths]) if lengths else 0
            self.cache = [*tensors, *lengths]
        return len(self.cache[0]) == N and position < self.cache[0].shape[2]


def _position(cache: Any, layers: int) -> int | None:
    """Returns the number of filled places of a cache; None if the cache is empty or of another kind."""
    kind: Any = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}.get(type(cache))
    if kind is None or getattr(cache, "offloading", False) or len(cache.layers) != layers:
        return None
    if any(type(layer) is not kind or not layer.is_initialized for layer in cache.layers):
        return None
    if kind is DynamicLayer:
        lengths = {layer.keys.shape[2] for layer in cache.layers}
    else:
        lengths = {layer.cumulative_length.item() for layer in cache.layers}
    return lengths.pop() if len(lengths) == 1 else None


def _places_seen(mask: Any, N: int, position: int) -> torch.Tensor | None:
    """Returns an attention mask as bool [N, T]; None if there is none, or it holds more than that."""
    if type(mask) not in TENSORS:
        return None
    if mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.ndim != 2 or mask.shape[0] not in (1, N) or mask.shape[1] <= position or mask.is_floating_point():
        return None
    mask_NT = mask.bool().expand(N, -1).contiguous()
    return mask_NT if bool(mask_NT[:, position].all()) else None  # a token sees itself

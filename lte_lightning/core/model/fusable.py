"""Decide whether `fused_decoding` takes a model, and collect the model's weights for its kernel."""

from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.exact import what_surrounds
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.prepared import prepare, routes
from lte_lightning.core.model.quantized import QuantizedLinear
from lte_lightning.core.model.storage import activation_name
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.decoder import Decoder, DecoderLayer, Matrix
from lte_lightning.kernels.cpu.ffn import DTYPES
from lte_lightning.kernels.quantized import QuantizedExperts

# Decoder layers that compute the same as LLaMA's: norm, attention with rotary positions, sum, norm, FFN, sum.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def why_not_fused(model: nn.Module) -> str:
    """Says why `fused_decoding` does not take a model, "" if it does."""
    if "forward" in model.__dict__:
        return "its forward was replaced or compiled already"
    base: Any = getattr(model, "model", None)
    layers, head = list(getattr(base, "layers", ())), getattr(model, "lm_head", None)
    for layer in layers:
        if type(layer).__name__ not in LAYERS or not type(layer).__module__.startswith("transformers."):
            return f"its layers are {type(layer).__name__}, and only {', '.join(LAYERS)} are known"
    if not layers or not isinstance(head, QuantizedLinear):
        return "it is not a quantised language model of the families LLaMA, Mistral, Qwen2 or Qwen3"
    config: Any = model.config
    if getattr(config, "sliding_window", None) is not None:
        return f"it attends to a sliding window ({config.sliding_window} tokens)"
    if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
        return "its configuration asks for attentions or hidden states"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, not sdpa or eager"
    if model.training:
        return "it is in train mode"
    if library() is None:
        return "the CPU kernels were not compiled"
    dtype = base.norm.weight.dtype
    if dtype not in DTYPES:
        return f"its activations are {dtype}"
    like = torch.empty(1, 1, config.hidden_size, dtype=dtype)
    facts = set()
    for i, layer in enumerate(layers):
        if why := _why_not_layer(layer, like):
            return f"layer {i} {why}"
        attention, ffn = layer.self_attn, layer.mlp
        epsilons = {norm.variance_epsilon for norm in (base.norm, *_norms(layer))}
        facts.add(
            (
                attention.scaling,
                attention.head_dim,
                ffn.experts,
                ffn.expert_size,
                activation_name(ffn.activation),
                *epsilons,
            )
        )
    return "its layers differ in shape" if len(facts) > 1 or len(next(iter(facts))) != 6 else ""


def _why_not_layer(layer: Any, like_BTD: torch.Tensor) -> str:
    attention, ffn = layer.self_attn, layer.mlp
    if not isinstance(ffn, ExpertFfn) or ffn.mode != "hard":
        return "selects no experts; set_mode(model, 'hard')"
    if ffn.backend not in ("auto", "cpu"):
        return f"is computed by the backend {ffn.backend!r}"
    prepared = prepare(ffn.parts, ffn.selector, ffn.expert_size, ffn.backend, like_BTD)
    if not isinstance(prepared.weights, QuantizedExperts):
        return f"has an FFN that no kernel computes: {prepared.choice.fallback or 'it is not quantised'}"
    if not routes(ffn.selector):
        return f"selects experts by {type(ffn.selector).__name__}, which is not one linear layer and a sigmoid"
    router: Any = ffn.selector.linear()
    if router[0].dtype not in DTYPES or (router[1] is not None and router[1].dtype != router[0].dtype):
        return f"has a router of {router[0].dtype}"
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, ffn.up, ffn.gate, ffn.down)
    bits = set()
    for linear in filter(None, linears):
        if not isinstance(linear, QuantizedLinear) or (linear.bias is not None and linear.bias.dtype != like_BTD.dtype):
            return f"has a projection that is no quantised one with a bias of {like_BTD.dtype}"
        bits.add(linear.matrix.bits)
    if len(bits) > 1:
        return "has projections of 4 and of 8 bits"
    for norm in _norms(layer):
        if not type(norm).__name__.endswith("RMSNorm") or norm.weight.dtype != like_BTD.dtype:
            return f"has a norm that is a {type(norm).__name__} of {norm.weight.dtype}"
    for module in layer.modules():
        if why := what_surrounds(module):
            return f"has a {type(module).__name__} that {why}"
    return ""


def _norms(layer: Any) -> list[Any]:
    own = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return [layer.input_layernorm, layer.post_attention_layernorm, *filter(None, own)]


def decoder_of(model: Any) -> Decoder:
    """Returns the weights of a model that `why_not_fused` accepts. They are the model's own tensors."""
    base, attention, ffn = model.model, model.model.layers[0].self_attn, model.model.layers[0].mlp
    like = torch.empty(1, 1, model.config.hidden_size, dtype=base.norm.weight.dtype)
    weights: Any = prepare(ffn.parts, ffn.selector, ffn.expert_size, "cpu", like).weights
    H = attention.head_dim
    return Decoder(
        [_layer(layer) for layer in base.layers],
        base.norm.weight,
        _matrix(model.lm_head),
        (attention.q_proj.out_features // H, attention.k_proj.out_features // H, H),
        weights.activation,
        base.norm.variance_epsilon,
        attention.scaling,
    )


def _layer(layer: Any) -> DecoderLayer:
    attention, ffn = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    router_ED, router_bias_E = ffn.selector.linear()
    return DecoderLayer(
        layer.input_layernorm.weight,
        _matrix(attention.q_proj),
        _matrix(attention.k_proj),
        _matrix(attention.v_proj),
        _matrix(attention.o_proj),
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        layer.post_attention_layernorm.weight,
        router_ED,
        router_bias_E,
        ffn.tau,
        _matrix(ffn.up),
        None if ffn.gate is None else _matrix(ffn.gate),
        _matrix(ffn.down),
    )


def _matrix(linear: QuantizedLinear) -> Matrix:
    return Matrix(linear.matrix, linear.bias)

"""Cost of a token: FLOPs, weights read, bytes moved, and the speed-up bound that follows.

All of it is counted from the modules and the configuration of a converted model, whose weights may be on the meta
device (see ``core/skeleton.py``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lte_lightning.core.model.experts import ExpertFfn, require_expert_ffns
from lte_lightning.core.model.parts import Projection, find_layers
from lte_lightning.core.model.quantized import is_quantized
from lte_lightning.core.routing.prune import weights_left
from lte_lightning.errors import UserError

GFLOP = 2**30  # as the paper counts
CONTEXT = 1024  # tokens attended to, unless said otherwise


@dataclass(frozen=True)
class TokenCost:
    """The cost of a token, densely or at a sparsity.

    Args:
        paper_flops: FLOPs as Table 1 of the paper counts them (see `flops_per_token`); its GFLOPs are 2^30.
        flops: FLOPs of all projections, the head's too, and of the attention scores at the context length.
        parameters: Weights read to decode the token at batch 1.
        bytes: Those weights, where pruned ones stood, and the KV cache, in bytes.
        ffn_bytes: Of these, the FFNs and their routers.
    """

    paper_flops: int
    flops: int
    parameters: int
    bytes: int
    ffn_bytes: int


def token_cost(
    model: PreTrainedModel,
    sparsity_per_layer: Sequence[float] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    context: int | None = None,
) -> TokenCost:
    """Counts the cost of a token.

    An embedding is charged one row, whatever else its module holds. The KV cache is read whole, a sliding window's no
    further back than the window; encoders have none. A router's weights are charged like the model's. In an
    encoder-decoder FLOPs are those of a token of input and one of output, bytes those of decoding alone, with the
    cross-attention's keys and values (projections and cache). A classifier counts as if it ran for each token;
    what DeBERTa adds for positions is left out. Of a weight that Wanda has pruned the others are read, and one bit for
    each that there was, which says where they stand.

    Args:
        model: A converted model.
        sparsity_per_layer: Share of the neurons that do not run (of TEAL and Wanda: of the FFN's weights that are not
            used), per layer. None: the dense model, without routers.
        dtype: Of weights and cache.
        context: Tokens that the token attends to, 0 for the weights alone; by default 1024, or the longest that the
            model has positions for.

    Raises:
        UserError: If the model was not converted, a sparsity lies outside [0, 1], their number is not that of the
            layers, or the model has no positions for the context.
    """
    ffns = _check_sparsity(model, sparsity_per_layer)
    context = check_context(model, context)
    paper_flops = flops_per_token(model, sparsity_per_layer)
    layers = {id(module) for layer in find_layers(model) for module in layer.modules()}
    others = [module for module in model.modules() if isinstance(module, Projection) and id(module) not in layers]
    head_flops = sum(2 * module.weight.numel() for module in others)
    attention_flops, cached_values = _attention(model, context)

    encoder = _encoder_modules(model)
    decoding = [i for i, ffn in enumerate(ffns) if id(ffn) not in encoder]
    sparsities = sparsity_per_layer or [0.0] * len(ffns)
    ffn_parameters = sum(
        _ffn_parameters(ffns[i], sparsities[i], with_selector=sparsity_per_layer is not None) for i in decoding
    )
    pruned = {} if sparsity_per_layer is None else weights_left(model)
    inside = {id(module) for ffn in ffns for module in ffn.modules()}
    gone = sum(module.weight.numel() - left for module, left in pruned.items() if id(module) not in inside)
    parameters = ffn_parameters + _other_parameters(model, skip=encoder) - gone
    places = {id(module): module.weight.numel() for module in pruned if id(module) not in encoder}
    return TokenCost(
        paper_flops=paper_flops,
        flops=paper_flops + head_flops + attention_flops,
        parameters=parameters,
        bytes=(parameters + cached_values) * dtype.itemsize + sum(places.values()) // 8,
        ffn_bytes=ffn_parameters * dtype.itemsize + sum(bits for key, bits in places.items() if key in inside) // 8,
    )


def speedup_bound(dense_bytes: int, sparse_bytes: int) -> float:
    """Returns how many times faster a memory-bound decoding can be at most: the quotient of the bytes moved."""
    return dense_bytes / sparse_bytes if sparse_bytes else math.inf


def flops_per_token(model: PreTrainedModel, sparsity_per_layer: Sequence[float] | None = None) -> int:
    """Counts FLOPs per token as in Table 1 of the paper: 2 per multiply-add of the layers' weights.

    Attention projections and FFNs count; embeddings, attention scores and the head do not. The paper's GFLOPs are these
    divided by 2^30. What Wanda has pruned does not count.

    Args:
        model: A converted model (its weights may be on the meta device).
        sparsity_per_layer: Share of the neurons that do not run (of TEAL and Wanda: of the FFN's weights that are not
            used), per layer. The routers' work is then added. None: the dense model.

    Raises:
        UserError: If the model was not converted, a sparsity lies outside [0, 1], or their number is not that of the
            layers.
    """
    ffns = _check_sparsity(model, sparsity_per_layer)
    inside = {id(module) for ffn in ffns for module in ffn.modules()}
    pruned = {} if sparsity_per_layer is None else weights_left(model)
    total = 0
    for layer in find_layers(model):
        outside = [m for m in layer.modules() if id(m) not in inside and isinstance(m, Projection)]
        total += sum(2 * pruned.get(module, module.weight.numel()) for module in outside)
    if sparsity_per_layer is None:
        return total + sum(ffn.flops_dense() for ffn in ffns)
    for ffn, sparsity in zip(ffns, sparsity_per_layer, strict=True):
        total += ffn.flops(sparsity)
    return total


def check_context(model: PreTrainedModel, context: int | None) -> int:
    """Returns the context length to count with.

    Raises:
        UserError: If it is negative, or longer than the model has positions for.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return min(CONTEXT, limit or CONTEXT)
    if context < 0 or (limit and context > limit):
        allowed = f"0 to {limit} (max_position_embeddings)" if limit else "0 or more"
        raise UserError(f"context is {context}; this {model.config.model_type} takes {allowed}")
    return context


def _check_sparsity(model: PreTrainedModel, sparsity_per_layer: Sequence[float] | None) -> list[ExpertFfn]:
    ffns = list(require_expert_ffns(model).values())
    if is_quantized(model):
        raise UserError(
            "costs are counted of a model's own weights, and this one is quantised; count before quantize()"
        )
    if sparsity_per_layer is None:
        return ffns
    if len(sparsity_per_layer) != len(ffns):
        raise UserError(f"{len(sparsity_per_layer)} sparsities for {len(ffns)} layers")
    for sparsity in sparsity_per_layer:
        if not 0.0 <= sparsity <= 1.0:  # NaN is caught, too
            raise UserError(f"sparsity is {sparsity}; it is the share of neurons that do not run, from 0 to 1")
    return ffns


def _encoder_modules(model: PreTrainedModel) -> set[int]:
    """The modules of an encoder-decoder that do not run when it decodes."""
    return {id(module) for module in model.get_encoder().modules()} if model.config.is_encoder_decoder else set()


def _ffn_parameters(ffn: ExpertFfn, sparsity: float, with_selector: bool) -> int:
    """The weights of an FFN that are read: all but those of the neurons that do not run."""
    selector = sum(parameter.numel() for parameter in ffn.selector.parameters())
    output_bias = 0 if ffn.down.bias is None else ffn.down.bias.numel()
    neurons = sum(parameter.numel() for parameter in ffn.parameters()) - selector - output_bias
    return round(neurons * ffn.computed(sparsity)) + output_bias + ffn.selector.weights_read() * with_selector


def cost_beside_dense(model: PreTrainedModel, sparsity_per_layer: Sequence[float] | None) -> dict[str, float]:
    """Returns FLOPs per token as the paper counts them, and bytes moved in bfloat16, sparse and dense.

    ``bound`` is the speed-up that the bytes allow at most.

    Args:
        model: A converted model.
        sparsity_per_layer: Of each FFN, 0 to 1; None for the dense model.
    """
    dense = token_cost(model)
    sparse = dense if sparsity_per_layer is None else token_cost(model, sparsity_per_layer)
    return {
        "flops_per_token": sparse.paper_flops,
        "dense_flops_per_token": dense.paper_flops,
        "bytes_per_token": sparse.bytes,
        "dense_bytes_per_token": dense.bytes,
        "bound": speedup_bound(dense.bytes, sparse.bytes),
    }


def _other_parameters(model: PreTrainedModel, skip: set[int]) -> int:
    """The weights outside the FFNs that are read; of an embedding one row, but a head tied to it is read whole."""
    inside = {id(module) for ffn in require_expert_ffns(model).values() for module in ffn.modules()}
    whole: dict[int, int] = {}
    rows: dict[int, int] = {}
    for module in model.modules():
        if id(module) in skip or id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                rows[id(parameter)] = module.embedding_dim
            else:
                whole[id(parameter)] = parameter.numel()
    return sum(whole.values()) + sum(rows.values())


def _attention(model: PreTrainedModel, context: int) -> tuple[int, int]:
    """FLOPs of attention scores and values for one token, and the numbers in the KV cache that decoding it reads."""
    config = model.config.get_text_config()
    width = config.num_attention_heads * _head_dim(model)
    layers = find_layers(model)
    key_values = 2 * _key_value_heads(model) * _head_dim(model)
    if config.is_encoder_decoder:
        encoder = _encoder_modules(model)
        decoders = sum(id(layer) not in encoder for layer in layers)
        return 4 * width * context * (len(layers) + decoders), key_values * context * 2 * decoders
    spans = _spans(model, context)
    caches = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # an encoder computes all keys at once
    return 4 * width * sum(spans), key_values * sum(spans) if caches else 0


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _key_value_heads(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return int(heads or config.num_attention_heads)


def _spans(model: PreTrainedModel, context: int) -> list[int]:
    """Returns how many tokens each layer attends to."""
    config = model.config.get_text_config()
    # ModernBERT's sliding_window is one side of its window
    window = getattr(config, "local_attention", None) or getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * len(find_layers(model))
    return [min(context, window or context) if kind == "sliding_attention" else context for kind in kinds]

"""Write a decoder's dense function as a GGUF file for llama.cpp, with the package ``gguf``."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.export.staging import staged
from lte_lightning.export.vocabulary import write_tokenizer

# The types of stored weights: our names, and GGUF's. Vectors stay float32, because llama.cpp requires that.
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_OWN = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_BLOCK = 32  # weights of a row that share a scale
_K_BLOCK = 256  # the same in llama.cpp's K types

Fields = dict[str, Any]  # names of the writer's methods without "add_", and their arguments
Change = Callable[[str, torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class _Target:
    """The architecture of llama.cpp for a Hugging Face model type.

    Args:
        arch: The architecture's name in llama.cpp.
        activation: The FFN's activation, which llama.cpp fixes for the architecture.
        change: Returns the values that llama.cpp expects, from a tensor's name in ``state_dict``, the tensor and the
            configuration.
        fields: Returns further fields from the configuration. Raises `UserError` for a setting that llama.cpp does not
            compute.
    """

    arch: str
    activation: str
    change: Change = lambda name, value, config: value
    fields: Callable[[Any], Fields] = lambda config: {}


def _interleave(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    """Interleaves the rows of q and k, so that the two values which RoPE rotates together are neighbours."""
    projection = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection)
    return value if heads is None else value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _raise_norms(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    return value + 1.0 if name.endswith("norm.weight") else value  # Gemma scales by 1 + weight


def _transpose(name: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    return value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value  # Conv1D


def _gemma(config: Any) -> Fields:
    _require(config, tie_word_embeddings=True, attention_bias=False, use_bidirectional_attention=(None, False))
    return {}


def _windowed(config: Any, pattern: int, softcaps: bool) -> Fields:
    """Returns Gemma's fields if ``pattern - 1`` layers with a sliding window precede each layer with full attention."""
    kinds = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(len(config.layer_types))
    ]
    _require(config, layer_types=kinds, query_pre_attn_scalar=config.head_dim)
    fields = {**_gemma(config), "sliding_window": config.sliding_window}
    if not softcaps:
        _require(config, final_logit_softcapping=None, attn_logit_softcapping=None)
        return fields
    caps = {"attn_logit_softcapping", "final_logit_softcapping"}
    return fields | {cap: getattr(config, cap) for cap in caps if getattr(config, cap)}


def _gpt2(config: Any) -> Fields:
    _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {}


def _qwen(config: Any) -> Fields:
    _require(config, use_sliding_window=False)
    return {}


_SILU, _TANH = "silu", "gelu_pytorch_tanh"
TARGETS = {
    "gemma": _Target("gemma", _TANH, _raise_norms, _gemma),
    "gemma2": _Target("gemma2", _TANH, _raise_norms, lambda config: _windowed(config, 2, softcaps=True)),
    "gemma3_text": _Target("gemma3", _TANH, _raise_norms, lambda config: _windowed(config, 6, softcaps=False)),
    "gpt2": _Target("gpt2", "gelu_new", _transpose, _gpt2),
    "llama": _Target("llama", _SILU, _interleave),
    "mistral": _Target("llama", _SILU, _interleave),
    "phi3": _Target("phi3", _SILU),
    "qwen2": _Target("qwen2", _SILU, fields=_qwen),
    "qwen3": _Target("qwen3", _SILU, fields=_qwen),
}


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, dtype: str = "auto") -> int:
    """Writes a plain decoder and its tokenizer as a GGUF file, whole or not at all.

    Args:
        model: A plain Hugging Face model; `restore` makes one of a converted model.
        tokenizer: The model's tokenizer, a fast one.
        file: The file to write.
        dtype: The type of stored matrices, a name of `TYPES`; ``auto`` is the model's own type. `stored_type` names
            the exceptions.

    Returns:
        The longest text, in tokens, for which llama.cpp computes the same as the model. In some families llama.cpp
        knows no sliding window.

    Raises:
        UserError: If the package ``gguf`` is missing, or llama.cpp would not compute the same as the model.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f'GGUF files need the package gguf: pip install "lte-lightning[export]" ({error})') from error
    target = find_target(model)
    if dtype != "auto" and dtype not in TYPES:
        raise UserError(f"unknown dtype {dtype!r}; a GGUF file has {', '.join(TYPES)}")
    config, kinds = model.config, gguf.GGMLQuantizationType
    matrix_type = kinds[TYPES[_OWN[model.dtype] if dtype == "auto" else dtype]]
    fields = _fields(config) | target.fields(config)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(None, target.arch)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(matrix_type.name, f"MOSTLY_{matrix_type.name}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if source := getattr(config, "_name_or_path", ""):
        writer.add_name(Path(source).name)
    write_tokenizer(writer, tokenizer, config.vocab_size)

    tensors = _tensors(model, gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, target.arch.upper()), _layers(config)))
    types, head = {}, "output.weight" if "output.weight" in tensors else "token_embd.weight"
    for name, (key, value) in tensors.items():
        shape = target.change(key, value, config).shape
        types[name] = kinds[stored_type(matrix_type.name, shape, is_head=name == head)]
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), shape.numel() // block * size, types[name])
    with staged(file) as staging:
        writer.write_header_to_file(staging)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (key, value) in tensors.items():  # one copy at a time
            array = target.change(key, value.detach(), config).float().cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(array, types[name]))
        writer.close()
    return int(fields["context_length"])


def stored_type(matrix_type: str, shape: torch.Size, is_head: bool) -> str:
    """Returns GGUF's name of the type that a tensor has in a file.

    Vectors are F32, and matrices of a quantised file F16 if their rows are no multiple of 32 weights.
    ``llama-quantize`` keeps more bits for the head of a Q4_0 file: Q8_0 if its rows are no multiple of 256 weights, and
    Q6_K otherwise. The package ``gguf`` cannot write Q6_K, so such a head is Q4_0 here.

    Args:
        matrix_type: GGUF's name of the file's type, as in `TYPES`.
        shape: The tensor's shape.
        is_head: Whether it is the head, or the embedding that the head is tied to.
    """
    if len(shape) == 1:
        return "F32"
    if matrix_type in ("Q8_0", "Q4_0") and shape[-1] % _BLOCK:
        return "F16"
    return "Q8_0" if is_head and matrix_type == "Q4_0" and shape[-1] % _K_BLOCK else matrix_type


def find_target(model: PreTrainedModel) -> _Target:
    """Returns what llama.cpp calls a model's architecture, and how it differs.

    Raises:
        UserError: If llama.cpp would not compute the same as the model.
    """
    if expert_ffns(model):
        raise UserError("llama.cpp computes the dense function alone: restore() the model first")
    kind, config = model.config.model_type, model.config
    if (target := TARGETS.get(kind)) is None:
        raise UserError(f"cannot write a {kind} model as GGUF; supported: {', '.join(TARGETS)}")
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise UserError(f"llama.cpp runs language models, and this is a {type(model).__name__}")
    if model.dtype not in _OWN:
        raise UserError(f"the weights are {model.dtype}; GGUF files are written from {', '.join(map(str, _OWN))}")
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next(value for name in names if (value := getattr(config, name, None)))
    if activation not in (target.activation, {"silu": "swish"}.get(target.activation)):
        raise UserError(
            f"the FFNs have the activation {activation}, and llama.cpp computes {target.activation} in a {kind} model"
        )
    return target


def _require(config: Any, **expected: Any) -> None:
    for name, value in expected.items():
        actual = getattr(config, name, None)
        if actual != value and not (isinstance(value, tuple) and actual in value):
            allowed = " or ".join(map(repr, value if isinstance(value, tuple) else (value,)))
            raise UserError(f"{name} is {actual!r}; llama.cpp supports only {allowed} in a {config.model_type} model")


def _layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def _fields(config: Any) -> dict[str, Any]:
    """Returns the fields of every family, by the names of the writer's methods."""
    heads, width = config.num_attention_heads, config.hidden_size
    context = config.max_position_embeddings
    fields = {
        "block_count": _layers(config),
        "embedding_length": width,
        "feed_forward_length": getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * width,
        "head_count": heads,
        "vocab_size": config.vocab_size,
    }
    if (epsilon := getattr(config, "rms_norm_eps", None)) is None:
        return fields | {"context_length": context, "layer_norm_eps": config.layer_norm_epsilon}
    if config.model_type in ("mistral", "phi3") and (window := getattr(config, "sliding_window", None)):
        context = min(context, window)  # llama.cpp shows these all tokens, which is the same up to here
    head = getattr(config, "head_dim", None) or width // heads
    fields |= {
        "context_length": context,
        "layer_norm_rms_eps": epsilon,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
    }
    return fields | _rope(config, head)


def _rope(config: Any, head: int) -> dict[str, Any]:
    by_kind = config.rope_parameters
    local = {}
    if "full_attention" in by_kind:  # Gemma 3: layers with a sliding window have their own settings
        _refuse_scaling(config, by_kind["sliding_attention"], ("default",))
        local, by_kind = {"rope_freq_base_swa": by_kind["sliding_attention"]["rope_theta"]}, by_kind["full_attention"]
    _refuse_scaling(config, by_kind, ("default", "linear"))
    fields = local | {
        "rope_freq_base": by_kind["rope_theta"],
        "rope_dimension_count": int(head * by_kind.get("partial_rotary_factor", 1.0)),
    }
    if by_kind["rope_type"] == "linear":
        from gguf import RopeScalingType

        fields |= {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": by_kind["factor"]}
    return fields


def _refuse_scaling(config: Any, rope: Mapping[str, Any], known: tuple[str, ...]) -> None:
    kind = rope["rope_type"]
    if kind not in known and not (kind == "llama3" and config.model_type == "llama"):
        raise UserError(f"RoPE of type {kind!r} is not supported in GGUF files; supported: {', '.join(known)}")


def _tensors(model: PreTrainedModel, names: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Returns a model's tensors and their names in its state dict, by GGUF's names."""
    state, tensors = model.state_dict(), {}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for key, value in state.items():
        if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
            raise UserError(f"llama.cpp has no place for {key} in a {model.config.model_type} model")
        tensors[name] = (key, value)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        rotary = model.base_model.rotary_emb
        tensors["rope_freqs.weight"] = ("rope_freqs.weight", _slowing(rope, rotary))
    return tensors


def _slowing(rope: Mapping[str, Any], rotary: Any) -> torch.Tensor:
    """Returns the factor by which Llama 3's scaling slows each frequency."""
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 2 * len(rotary.inv_freq), 2) / (2 * len(rotary.inv_freq)))
    return plain / rotary.inv_freq.cpu()

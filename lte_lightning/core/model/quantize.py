"""Quantise a converted model for decoding on a CPU, and read and write quantised weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.attention import use_attention
from lte_lightning.core.model.checks import is_finite, listed
from lte_lightning.core.model.exact import is_sharded, what_surrounds, why_not_linear
from lte_lightning.core.model.experts import expert_ffns, require_expert_ffns
from lte_lightning.core.model.names import own_names
from lte_lightning.core.model.parts import find_layers, weight_rows
from lte_lightning.core.model.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    is_quantized,
    pack_weights,
    stored_linear,
)
from lte_lightning.core.model.residual import use_sum_norms
from lte_lightning.errors import UserError
from lte_lightning.kernels.quantized import Bits, Shape, quantize_matrix

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
# Every token reads the whole head, and no later layer can make up for the head's errors.
HEAD_BITS: Bits = 8
_Site = tuple[str, nn.Module, Shape]


def quantize(model: PreTrainedModel, kind: Quantization = "int8") -> PreTrainedModel:
    """Rounds the weights of a converted model to 8 or 4 bits, in place, to decode faster on a CPU.

    It rounds experts, the other projections of the transformer layers, and the head with a tied embedding. Norms,
    routers, biases, other embeddings and a classifier stay as they are. The head keeps 8 bits. Skipped experts stay
    skipped, and every mode goes on working. Inputs of products are rounded to 8 bits in groups of 32. The function
    checks everything before it changes anything. It cannot be undone, and the model cannot be trained afterwards.

    Args:
        model: A converted model in evaluation mode, on the CPU.
        kind: ``int8`` or ``int4``. 32 neighbouring inputs of an output share a scale of 16 bits. In a down projection
            these inputs are 32 neurons of an expert.

    Returns:
        The same model.

    Raises:
        UserError: If there is no such kind; the model was not converted, is quantised already, is in train mode, or is
            not on the CPU; or a projection is not its weight and bias alone, or has hooks, or holds NaN.
    """
    require_quantization(kind)
    require_expert_ffns(model)
    if is_quantized(model):
        raise UserError(f"this {type(model).__name__} is quantised already; load the model that it was made from")
    if model.training:
        raise UserError("the model is in train mode, and a quantised model cannot be trained; call model.eval() first")
    sites = list(_sites(model))
    _require_plain(model, sites)
    head, tied = _head(model), _tied_embedding(model)
    bits: Bits = 8 if kind == "int8" else 4
    dtype: Any = sites[0][1].weight.dtype
    model.config.dtype = dtype  # the type of all other weights, and of a saved folder
    for name, module, shape in sites:
        weight_RK = weight_rows(module)  # type: ignore[arg-type]
        matrix = quantize_matrix(weight_RK, HEAD_BITS if module is head else bits, shape)
        _replace(model, name, QuantizedLinear(matrix, module.bias))  # type: ignore[arg-type]
    if tied is not None:
        _replace_embedding(model, tied)
    pack_weights(model)
    use_attention(model)
    use_sum_norms(model)
    model.requires_grad_(False)
    return model


def require_quantization(kind: str) -> None:
    """Refuses the name of an unknown quantisation.

    Raises:
        UserError: If there is no such quantisation.
    """
    if kind not in QUANTIZATIONS:
        raise UserError(f"unknown quantisation {kind!r}; there are {', '.join(QUANTIZATIONS)}")


def require_kind(description: dict[str, Any], kind: str | None, source: object) -> None:
    """Refuses to quantise a folder in another way than it was saved.

    Raises:
        UserError: If ``kind`` is not the kind that the folder's ``lte_config.json`` describes.
    """
    saved = description.get("quantized", {}).get("kind")
    if kind is not None and kind != saved:
        raise UserError(f"{source} was saved as {saved}, and cannot be made {kind}; load the model it was made from")


def quantization(model: nn.Module) -> Quantization | None:
    """Returns the quantisation of a model's experts; None if they are not quantised."""
    for ffn in expert_ffns(model).values():
        up: object = ffn.up
        if isinstance(up, QuantizedLinear):
            return "int8" if up.matrix.bits == 8 else "int4"
    return None


def _sites(model: PreTrainedModel) -> Iterator[_Site]:
    """Yields each quantised part: its name, the module, and the shape of its weight's parts."""
    names = {id(module): name for name, module in model.named_modules()}
    ffns = expert_ffns(model)
    inside = {id(module) for ffn in ffns.values() for module in ffn.modules()}
    for name, ffn in ffns.items():
        rows = Shape(ffn.experts, ffn.expert_size, 1, ffn.width)
        columns = Shape(1, ffn.width, ffn.experts, ffn.expert_size)
        for part, projection, shape in (("up", ffn.up, rows), ("gate", ffn.gate, rows), ("down", ffn.down, columns)):
            if projection is not None:
                yield f"{name}.{part}", projection, shape
    for layer in find_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside:
                inside.add(id(module))
                yield names[id(module)], module, _whole(module)
    head = _head(model)
    if head is not None:
        yield names[id(head)], head, _whole(head)


def _whole(module: nn.Module) -> Shape:
    R, K = weight_rows(module).shape  # type: ignore[arg-type]
    return Shape(1, R, 1, K)


def _head(model: PreTrainedModel) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear | QuantizedLinear) else None


def _tied_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Returns the embedding that shares its weight with the head, if it does nothing but look up rows."""
    embedding, head = model.get_input_embeddings(), _head(model)
    is_tied = head is not None and getattr(embedding, "weight", None) is getattr(head, "weight", ())
    return embedding if is_tied and type(embedding) is nn.Embedding else None


def _require_plain(model: PreTrainedModel, sites: list[_Site]) -> None:
    """Refuses a model that would lose parts, or compute differently, after quantisation."""

    def refuse(name: str, why: str, way_out: str) -> None:
        raise UserError(f"{name} of this {type(model).__name__} {why}, and cannot be quantised; {way_out}")

    for name, module in model.named_modules():
        if any("lora_" in part or part == "base_layer" for part in name.split(".")):
            refuse(name.rpartition(".")[0], "has an adapter", "merge it first (merge_and_unload(), or merge_lora)")
        if is_sharded(module):
            refuse(name or "the whole", "is sharded", "load the model in one process")
    for name, module, _ in sites:
        if why := why_not_linear(module):
            refuse(name, why, "quantize() takes Linear and Conv1D with ordinary weights")
        if why := what_surrounds(module):
            refuse(name, why, "remove them first")
        weight: Any = module.weight
        if weight.device.type != "cpu":
            refuse(name, f"is on {weight.device}", "quantised weights are computed on a CPU only: model.to('cpu')")
        if not is_finite(weight):
            refuse(name, "holds NaN or infinite values", "whatever it computes means nothing")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())


def _replace_embedding(model: PreTrainedModel, embedding: nn.Embedding) -> None:
    head = _head(model)
    assert isinstance(head, QuantizedLinear)
    looks_up = QuantizedEmbedding(head, embedding).eval()
    # An encoder and a decoder may share it, as one module or as two modules with one weight.
    weight, places = embedding.weight, list(model.named_modules(remove_duplicate=False))
    for name, module in places:
        if module is embedding or (type(module) is nn.Embedding and module.weight is weight):
            _replace(model, name, looks_up)


def write_quantized(model: PreTrainedModel, file: Path) -> dict[str, Any]:
    """Writes all weights of a quantised model except its routers, under their names in memory.

    Args:
        model: The model.
        file: A safetensors file.

    Returns:
        The description of the weights for ``lte_config.json``.
    """
    tensors, seen = {}, set()
    for name, tensor in _state(model).items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or not tensor.numel():
            seen.add(key)
            tensors[name] = tensor.contiguous()
    save_file(tensors, file, {"format": "pt"})
    tied = isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    return {"kind": quantization(model), "tied_embedding": tied}


def load_quantized(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], tied: bool) -> None:
    """Loads stored quantised weights into a converted model whose own weights do not matter.

    Args:
        model: A converted model.
        tensors: The tensors that `write_quantized` wrote.
        tied: Whether the embedding looks up rows of the head.

    Raises:
        ValueError: If the tensors do not fit the model.
    """
    left = dict(tensors)
    embedding = _tied_embedding(model) or model.get_input_embeddings()
    for name, module, shape in list(_sites(model)):
        own = {key: left.pop(f"{name}.{key}", None) for key in ("blocks", "scale", "bias")}
        if (own["bias"] is None) != (module.bias is None):
            raise ValueError(f"{name} has a bias, or lacks it")
        present = {key: value for key, value in own.items() if value is not None}
        _replace(model, name, stored_linear(name, shape, present))
    if tied:
        if not isinstance(embedding, nn.Embedding):
            raise ValueError("there is no embedding that could be tied")
        _replace_embedding(model, embedding)
    state = _state(model)
    for name, value in left.items():
        if name not in state or state[name].shape != value.shape:
            raise ValueError(f"the model has no {name} of shape {list(value.shape)}")
        state[name].copy_(value)
    loaded = {state[name].data_ptr() for name in left}
    replaced = (".blocks", ".scale", ".bias")
    if missing := [
        name
        for name, tensor in state.items()
        if tensor.numel() and tensor.data_ptr() not in loaded and not (name in tensors and name.endswith(replaced))
    ]:
        raise ValueError(f"weights are missing: {listed(missing)}")
    pack_weights(model)
    use_attention(model)
    use_sum_norms(model)
    model.requires_grad_(False)


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    routers = {f"{name}.selector." for name in expert_ffns(model)}
    with own_names():
        return {
            name: tensor.detach()
            for name, tensor in model.state_dict().items()
            if not any(name.startswith(prefix) for prefix in routers)
        }

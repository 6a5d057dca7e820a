"""Check that a loaded model has all of its weights, no others, and only finite values."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lte_lightning.core.model.exact import is_part
from lte_lightning.core.model.parts import find_row
from lte_lightning.core.model.sharding import whole
from lte_lightning.errors import UserError
from lte_lightning.files import abridged

# Buffers in files of earlier versions of transformers, which later versions do not read.
_OLD_BUFFERS = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
_LEVELS = ("level", "levels")
MOST_LAYERS = 10_000


def require_sizes(config: PreTrainedConfig) -> None:
    """Refuses a configuration of so many layers that making them would take for ever.

    Raises:
        UserError: If it has too many layers.
    """
    for key, value in config.to_dict().items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{key} is {abridged(value)}, and no model has more than {MOST_LAYERS} layers")


def require_complete(
    model: PreTrainedModel, info: dict[str, Any], source: object, cut: bool = False, own: bool = False
) -> None:
    """Refuses a model that lacks weights other than a new task's, or whose file has unknown weights for its layers.

    Args:
        model: The model.
        info: Its loading info, as ``from_pretrained(..., output_loading_info=True)`` returns it.
        source: The model's origin, for the message.
        cut: Whether the model shall have fewer layers than the file.
        own: Whether this package wrote the file, so that it has no weights beside those of its model's class.

    Raises:
        UserError: If weights are missing or unknown.
    """
    name = type(model).__name__
    same_class = name in (model.config.architectures or ())
    missing = [key for key in sorted(info["missing_keys"]) if same_class or not _is_new(model, key)]
    if missing:
        way_out = "Save the model again, or get the folder again"
        if all(key.startswith("pooler.") for key in missing):
            way_out = "If the model has no pooler, load it with add_pooling_layer=False"
        raise UserError(f"{source} lacks weights of a {name}: {listed(missing)}; they would be random. {way_out}")
    paths = "|".join(map(re.escape, find_row(model.config.model_type).layers))
    inside = re.compile(rf"(^|\.)({paths})\.\d+\.")
    others = [key for key in sorted(info["unexpected_keys"]) if not _OLD_BUFFERS.search(key)]
    if not (own and same_class):
        others = [key for key in others if inside.search(key)]
    if others and not cut:
        raise UserError(
            f"{source} has weights that a {name} of its config.json does not take: {listed(others)}; the two do not "
            "belong together"
        )


def _is_new(model: PreTrainedModel, key: str) -> bool:
    """Says whether a weight is outside of the base model, or in its pooler; another task may lack such a weight."""
    prefix = model.base_model_prefix
    within = key.startswith(f"{prefix}.") if hasattr(model, prefix) else True
    return not within or key.removeprefix(f"{prefix}.").startswith("pooler.")


def require_finite(tensors: dict[str, torch.Tensor], source: object) -> None:
    """Refuses NaN and infinite values.

    Raises:
        UserError: If there are any.
    """
    wrong = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        raise UserError(f"{source} holds NaN or infinite values: {listed(wrong)}; whatever it computes means nothing")


def require_floating(tensors: dict[str, torch.Tensor], source: object) -> None:
    """Refuses weights that are stored as whole numbers, which transformers would cast to what they do not mean.

    Raises:
        UserError: If there are any.
    """
    wrong = [
        f"{name} ({tensor.dtype})"
        for name, tensor in tensors.items()
        if name.endswith((".weight", ".bias")) and not tensor.dtype.is_floating_point
    ]
    if wrong:
        raise UserError(f"{source} holds weights that are no floating-point numbers: {listed(wrong)}; get it again")


def require_dense(state: Mapping[str, Any]) -> None:
    """Refuses a state dict with values that are not stored as the numbers that they stand for. Shards may be in it.

    Raises:
        UserError: If there is one.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
        elif value.layout is not torch.strided:
            kind = f"tensor of layout {value.layout}"
        elif hasattr(value, "__tensor_flatten__") and not is_part(value):  # made of other tensors, as torchao's are
            kind = f"{type(value).__name__} of {type(value).__module__}"
        else:
            continue
        raise UserError(f"{key} of the state dict is a {kind}, and only dense tensors are saved")


def require_sound_routers(routers: dict[str, torch.Tensor], source: object) -> None:
    """Refuses NaN and infinite values. Only levels of selectors may be infinite, because a level may pass all or none.

    Raises:
        UserError: If there are any.
    """
    seen = {key: value.nan_to_num(nan=torch.nan) if key.endswith(_LEVELS) else value for key, value in routers.items()}
    require_finite(seen, source)


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Says whether a tensor has only finite values. A tensor that was moved to the disk shows none, and passes."""
    if tensor.is_meta or not tensor.numel() or not tensor.dtype.is_floating_point:
        return True
    if is_part(tensor):
        return bool(whole(tensor.isfinite().all()))
    lowest, highest = tensor.aminmax()  # one pass; with NaN both are NaN
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def listed(names: list[str], most: int = 3) -> str:
    """Returns the first few names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

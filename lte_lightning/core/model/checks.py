"""Checks of a loaded model: all of its weights are there, no others, and all are finite."""

import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lte_lightning.core.model.parts import find_row
from lte_lightning.core.model.sharding import is_part, whole
from lte_lightning.errors import UserError
from lte_lightning.files import abridged

# Buffers that files of earlier transformers hold, and no later one reads.
_OLD_BUFFERS = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
_LEVELS = ("level", "levels")
MOST_LAYERS = 10_000


def require_sizes(config: PreTrainedConfig) -> None:
    """Refuses a configuration of so many layers that making them would take for ever.

    Raises:
        UserError: If it has.
    """
    for key, value in config.to_dict().items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{key} is {abridged(value)}, and no model has more than {MOST_LAYERS} layers")


def require_complete(model: PreTrainedModel, info: dict[str, Any], source: object, cut: bool = False) -> None:
    """Refuses a model that lacks weights which are not a new task's, or whose file has others for its layers.

    Args:
        model: The model.
        info: Its loading info, as ``from_pretrained(..., output_loading_info=True)`` returns it.
        source: Where it is from, for the message.
        cut: Whether the model is to have fewer layers than the file.

    Raises:
        UserError: If it does.
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
    others = [key for key in sorted(info["unexpected_keys"]) if inside.search(key) and not _OLD_BUFFERS.search(key)]
    if others and not cut:
        raise UserError(
            f"{source} has weights that a {name} of its config.json does not take: {listed(others)}; the two do not "
            "belong together"
        )


def _is_new(model: PreTrainedModel, key: str) -> bool:
    """Says whether a weight is of a head that another task may lack: outside of the base model, or its pooler."""
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


def require_sound_routers(routers: dict[str, torch.Tensor], source: object) -> None:
    """Refuses NaN and infinite values, but for the levels of selectors, which may let all pass or none.

    Raises:
        UserError: If there are any.
    """
    seen = {key: value.nan_to_num(nan=torch.nan) if key.endswith(_LEVELS) else value for key, value in routers.items()}
    require_finite(seen, source)


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Says whether a tensor has finite values only, or none that can be seen (one that was moved to the disk)."""
    if tensor.is_meta or not tensor.numel() or not tensor.dtype.is_floating_point:
        return True
    if is_part(tensor):
        return bool(whole(tensor.isfinite().all()))
    lowest, highest = tensor.aminmax()  # in one pass, and NaN is either
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def listed(names: list[str], most: int = 3) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

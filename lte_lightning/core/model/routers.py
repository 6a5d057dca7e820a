"""Load a saved model's routers into a model, alone or with the weights that they belong to."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lte_lightning.core.model.checks import require_sound_routers
from lte_lightning.core.model.experts import expert_ffns, require_expert_ffns
from lte_lightning.core.model.folder import (
    CONFIG_FILE,
    ROUTERS_FILE,
    LayoutError,
    read_description,
    read_lte_config,
    read_routers,
)
from lte_lightning.core.model.names import is_held, plain_names, same, weight_names
from lte_lightning.core.model.saved_together import require_own
from lte_lightning.core.model.swap import lte_config
from lte_lightning.errors import UserError


def load_routers(model: PreTrainedModel, routers: Mapping[str, torch.Tensor], origin: Path | str) -> None:
    """Loads stored routers into a converted model.

    Args:
        model: The model.
        routers: The tensors that `read_routers` returns.
        origin: The routers' origin, for messages.

    Raises:
        LayoutError: If the routers do not fit the model.
    """
    # A task's model has the base model under this name. The base model alone does not.
    base = f"{model.base_model_prefix}."
    stored = {key.removeprefix(base): value for key, value in routers.items()}
    for name, ffn in require_expert_ffns(model).items():
        prefix = f"{name.removeprefix(base)}."
        own = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
        try:
            ffn.selector.load_state_dict(own)
        except RuntimeError as error:
            raise LayoutError(f"{origin} does not fit the model at {name}: {error}") from error
    if stored:
        raise LayoutError(f"{origin} has weights that no layer takes: {', '.join(sorted(stored)[:3])}")


def with_routers(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Returns a state dict with the routers that belong to its weights, if it has none.

    Code that loads the weights of a saved folder into a model, like a `Trainer` that resumes, calls ``load_state_dict``
    without the routers, which lie in a file beside the weights. Linux says which file a tensor is mapped from. On other
    systems the routers stay unknown.

    Args:
        model: The converted model that loads the state dict.
        state: Weights under the plain names, or under those in memory.

    Raises:
        UserError: If the model is routed, the weights of its FFNs would change, and the place of their routers is
            unknown; or if the weights' folder and the model were converted differently.
    """
    ffns = expert_ffns(model)
    known = {f"{name}.selector.{key}" for name, ffn in ffns.items() for key in ffn.selector.state_dict()}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = {key for key, value in state.items() if is_held(value, held.get(key))}
    loaded = plain_names(ffns, {key: value for key, value in state.items() if key not in kept})
    mine = weight_names(ffns) & set(loaded)
    # torch's distributed loading adds the model's tensors, weights as well as routers, to what it has read.
    adds = any(f"{name}.up.weight" in kept for name in ffns)
    if not mine or not known or known & set(loaded if adds else state):
        return state
    file = _mapped_from(loaded[min(mine)])
    if file is not None and (file.parent / CONFIG_FILE).exists():
        folder = file.parent
        _require_same_conversion(model, folder)
        own = read_routers(folder)
        require_sound_routers(own, folder / ROUTERS_FILE)
        description = read_description(folder) | {"transformers": None}  # a live configuration may have more settings
        require_own(description, loaded, own, model.config, folder)
        return {**state, **{_own_name(ffns, key): value for key, value in own.items()}}
    if all(ffn.mode == "dense" for ffn in ffns.values()):
        return state
    current = plain_names(ffns, model.state_dict())
    if all(key in current and same(loaded[key], current[key]) for key in mine):
        return state
    raise UserError(
        f"these weights come without routers ({ROUTERS_FILE} is the file of a saved folder that holds them), and those "
        "of the model belong to other weights; begin with model = lte_lightning.from_pretrained(FOLDER), which loads "
        "both, or set_mode(model, 'dense') if the routers are yet to be trained"
    )


def _own_name(ffns: Mapping[str, Any], stored: str) -> str:
    name = next((name for name in ffns if stored.startswith(f"{name}.")), None)
    if name is None:
        raise LayoutError(f"{ROUTERS_FILE} has weights that no layer takes: {stored}")
    return f"{name}.selector.{stored.removeprefix(f'{name}.')}"


def _require_same_conversion(model: PreTrainedModel, folder: Path) -> None:
    saved, mine = asdict(read_lte_config(folder)), asdict(lte_config(model))
    changed = [f"{key}: {saved[key]} there, {mine[key]} here" for key in saved if saved[key] != mine[key]]
    changed = [each for each in changed if not each.startswith("seed")]
    if changed:
        raise UserError(
            f"{folder} was converted otherwise than this model ({', '.join(changed)}); begin with "
            "model = lte_lightning.from_pretrained(FOLDER)"
        )


def _mapped_from(tensor: torch.Tensor) -> Path | None:
    """Returns the file that a tensor is mapped from; None if there is none, or the system does not say."""
    try:
        regions = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    address = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    for region in regions:
        span, *_, last = region.split(maxsplit=5)
        first, end = (int(bound, 16) for bound in span.split("-"))
        if first <= address < end:
            return Path(last) if last.startswith("/") else None
    return None

"""A saved model's routers: how they get into a model, by themselves or with the weights that they belong to."""

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
    require_own,
)
from lte_lightning.core.model.names import is_held, plain_names, weight_names
from lte_lightning.core.model.swap import lte_config
from lte_lightning.errors import UserError


def load_routers(model: PreTrainedModel, routers: Mapping[str, torch.Tensor], origin: Path | str) -> None:
    """Puts stored routers into a converted model.

    Args:
        model: The model.
        routers: As `read_routers` returns them.
        origin: Where they are from, for messages.

    Raises:
        LayoutError: If they do not fit.
    """
    # a task's model has the base model under a name, and the base model alone has none
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

    Whoever loads the weights of a saved folder into a model (`Trainer`, resuming, is one) gives them to
    ``load_state_dict`` without the routers, which lie in the file beside. Linux says which file a tensor is mapped
    from; elsewhere the routers stay unknown.

    Args:
        model: The converted model that is to be given the state dict.
        state: Weights under the plain names, or under those in memory.

    Raises:
        UserError: If routers are needed, for the model is routed and the weights of its FFNs would change, and it is
            not known where they are; or if the folder of the weights was converted otherwise than the model.
    """
    ffns = expert_ffns(model)
    known = {f"{name}.selector.{key}" for name, ffn in ffns.items() for key in ffn.selector.state_dict()}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    given = plain_names(ffns, {key: value for key, value in state.items() if not is_held(value, held.get(key))})
    mine = weight_names(ffns) & set(given)
    if not mine or not known or known & set(given):
        return state
    file = _mapped_from(given[min(mine)])
    if file is not None and (file.parent / CONFIG_FILE).exists():
        folder = file.parent
        _require_same_conversion(model, folder)
        own = read_routers(folder)
        require_sound_routers(own, folder / ROUTERS_FILE)
        require_own(read_description(folder), given, own, folder)
        return {**state, **{_own_name(ffns, key): value for key, value in own.items()}}
    if all(ffn.mode == "dense" for ffn in ffns.values()):
        return state
    current = plain_names(ffns, model.state_dict())
    if all(key in current and _same(given[key], current[key]) for key in mine):
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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _mapped_from(tensor: torch.Tensor) -> Path | None:
    """Returns the file whose pages a tensor's memory is, None if it is of none, or the system does not say."""
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

"""Give the state dicts of converted models Hugging Face's names.

In memory an FFN is one module (``mlp.up.weight``). In a state dict its weights have a plain model's names
(``mlp.up_proj.weight``), and the selector's weights stand beside them (``mlp.selector.weight``). Loading takes both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.exact import is_part
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.fused import join, split
from lte_lightning.errors import UserError

_OWN: ContextVar[bool] = ContextVar("own_names", default=False)


@contextmanager
def own_names() -> Iterator[None]:
    """Keeps the names in memory in every state dict that a ``with`` block makes."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def name_as_plain(layer: nn.Module) -> None:
    """Gives plain names to the state dicts of a layer with an expert FFN, and to those of all modules around it."""
    layer.register_state_dict_post_hook(_on_saving)
    layer.register_load_state_dict_pre_hook(_on_loading)


def name_as_is(layer: nn.Module) -> None:
    """Undoes `name_as_plain`."""
    # Remove the hooks themselves, because their handles would not survive a deep copy.
    for hooks, own in ((layer._state_dict_hooks, _on_saving), (layer._load_state_dict_pre_hooks, _on_loading)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is own]:
            del hooks[key]


def plain_names(ffns: Mapping[str, ExpertFfn], state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with plain names, from names of either kind.

    It joins the halves of a fused projection. Sharded halves keep their names, because joining them would need every
    process.

    Args:
        ffns: The expert FFNs, by their names in the module of the state dict.
        state: The state dict, which stays unchanged.
    """
    renamed = {own[0]: (plain, own) for plain, own in _renames(ffns) if all(key in state for key in own)}
    renamed = {key: (plain, own) for key, (plain, own) in renamed.items() if len(own) == 1 or not is_part(state[key])}
    joined = {own[-1] for _, own in renamed.values() if len(own) > 1}
    names = {}
    for key, value in state.items():
        if key in renamed:
            plain, own = renamed[key]
            names[plain] = value if len(own) == 1 else join(*(state[half] for half in own))
        elif key not in joined:
            names[key] = value
    return names


def weight_names(ffns: Mapping[str, ExpertFfn]) -> set[str]:
    """Returns the names of expert FFNs' weights and biases in a plain model. Some of the biases may not exist."""
    return {plain for plain, _ in _renames(ffns)}


def _renames(ffns: Mapping[str, ExpertFfn]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields a weight's plain name and its names in memory. A fused projection has two: the gate's and up's."""
    for name, ffn in ffns.items():
        row = ffn.row
        # The FFN replaces its whole module, or it has the place of the first projection.
        stem = f"{name}." if row.module else name.removesuffix(row.up)
        module = f"{row.module}." if row.module else ""
        parts = {"down": row.down} if row.fused else {"up": row.up, "gate": row.gate, "down": row.down}
        for tensor in ("weight", "bias"):
            if row.fused:
                yield f"{stem}{row.up.removeprefix(module)}.{tensor}", (f"{name}.gate.{tensor}", f"{name}.up.{tensor}")
            for own, path in parts.items():
                if path is not None:
                    yield f"{stem}{path.removeprefix(module)}.{tensor}", (f"{name}.{own}.{tensor}",)


def _ffns(layer: nn.Module, prefix: str) -> dict[str, ExpertFfn]:
    return {f"{prefix}{name}": module for name, module in layer.named_modules() if isinstance(module, ExpertFfn)}


def _on_saving(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    mine = {key: state[key] for key in state if key.startswith(prefix)}
    # For sharded weights (DTensors), torch's own tools look up in the model what a state dict's name stands for.
    if _OWN.get() or any(map(is_part, mine.values())):
        return
    for key in mine:
        del state[key]
    state.update(plain_names(_ffns(layer, prefix), mine))


def _on_loading(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    held = {f"{prefix}{name}": tensor for name, tensor in layer.named_parameters()}
    ffns = _ffns(layer, prefix)
    for plain, own in _renames(ffns):
        if plain in state and not any(key in state and not is_held(state[key], held.get(key)) for key in own):
            value = state.pop(plain)
            state.update(zip(own, [value] if len(own) == 1 else split(value), strict=True))
    for name, ffn in ffns.items():
        _require_routers(name, ffn, {key: tensor for key, tensor in held.items() if key.startswith(f"{name}.")}, state)


def _require_routers(name: str, ffn: ExpertFfn, held: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Refuses other weights for a routed FFN without its router.

    `ExpertMethods.load_state_dict` sees to that for the whole model, and torch for a part of it that is loaded with
    ``strict``.
    """
    routed = ffn.mode != "dense" and any(key.startswith(f"{name}.selector.") for key in held)
    if not routed or any(key.startswith(f"{name}.selector.") for key in state):
        return
    for key, tensor in held.items():
        value = state.get(key)
        if isinstance(value, torch.Tensor) and not (is_part(value) or is_part(tensor) or same(value, tensor)):
            raise UserError(
                f"{key} comes without its router ({name}.selector), and that of the model belongs to other weights; "
                "load the state dict of a converted model, or set_mode(model, 'dense') if routers are yet to be trained"
            )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Says whether two tensors hold the same values, those of the first in the type of the second."""
    return one.shape == other.shape and torch.equal(one.to(other), other)


def is_held(value: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    """Says whether a value is a module's own tensor. torch's distributed loading adds these to the loaded values."""
    if tensor is None or is_part(tensor) or value.device != tensor.device:
        return False
    return value.data_ptr() == tensor.data_ptr() != 0

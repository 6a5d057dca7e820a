"""State dicts of converted models have Hugging Face's names.

In memory an FFN is one module (``mlp.up.weight``); in a state dict its weights are called what a plain model calls them
(``mlp.up_proj.weight``), and the selector's stand beside them (``mlp.selector.weight``). Loading takes either names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.fused import join, split

_OWN: ContextVar[bool] = ContextVar("own_names", default=False)


@contextmanager
def own_names() -> Iterator[None]:
    """Leaves the names as they are in memory, in every state dict that is made in a ``with`` block."""
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def name_as_plain(layer: nn.Module) -> None:
    """Makes the state dicts of a layer with an expert FFN, and of all modules around it, have the plain names."""
    layer.register_state_dict_post_hook(_on_saving)
    layer.register_load_state_dict_pre_hook(_on_loading)


def name_as_is(layer: nn.Module) -> None:
    """Undoes `name_as_plain`."""
    # by the hooks themselves: their handles would not survive a deep copy
    for hooks, own in ((layer._state_dict_hooks, _on_saving), (layer._load_state_dict_pre_hooks, _on_loading)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is own]:
            del hooks[key]


def plain_names(ffns: Mapping[str, ExpertFfn], state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict with the plain names, whichever it has; the halves of a fused projection are joined.

    Args:
        ffns: The expert FFNs, by their names in the module that the state dict is of.
        state: The state dict. It is left as it is.
    """
    renamed = {own[0]: (plain, own) for plain, own in _renames(ffns) if all(key in state for key in own)}
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
    """Returns the names of expert FFNs' weights in a plain model, with those of biases that may be missing."""
    return {plain for plain, _ in _renames(ffns)}


def _renames(ffns: Mapping[str, ExpertFfn]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields a weight's plain name, and its name in memory: two of a fused projection, the gate's and the other's."""
    for name, ffn in ffns.items():
        row = ffn.row
        # where the FFN stands for its whole module, and where it has the place of the first projection
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
    # Of sharded weights (DTensors) torch's own tools look for what a name in a state dict stands for.
    if _OWN.get() or any(hasattr(value, "placements") for value in mine.values()):
        return
    for key in mine:
        del state[key]
    state.update(plain_names(_ffns(layer, prefix), mine))


def _on_loading(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    held = {f"{prefix}{name}": tensor for name, tensor in layer.named_parameters()}
    for plain, own in _renames(_ffns(layer, prefix)):
        if plain in state and not any(key in state and not is_held(state[key], held.get(key)) for key in own):
            value = state.pop(plain)
            state.update(zip(own, [value] if len(own) == 1 else split(value), strict=True))


def is_held(value: torch.Tensor, tensor: torch.Tensor | None) -> bool:
    """Says whether a value is what a module holds: torch's distributed loading adds that to what it was given."""
    if tensor is None or hasattr(tensor, "placements") or value.device != tensor.device:
        return False
    return value.data_ptr() == tensor.data_ptr() != 0

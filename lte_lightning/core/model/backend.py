"""`set_backend`: asks for a backend, and lays the weights out for it. `kernels.dispatch` chooses at each call."""

from torch import nn

from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import require_expert_ffns
from lte_lightning.core.model.storage import lay_out
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import BACKENDS, Backend


def set_backend(model: nn.Module, backend: Backend = "auto") -> None:
    """Sets the backend that computes the selected experts in hard mode without gradients.

    For every backend but ``dense-mask`` the weights are laid out once, in place, a row per neuron: the down
    projection's parameter becomes a transposed view of that. Names, shapes and values stay, and with them state_dict,
    dense mode, training and saving; nothing is stored twice. ``dense-mask`` undoes it, as `restore` does: torch
    multiplies few tokens by transposed bfloat16 weights at two thirds of the speed.

    The kernels read weights and biases, and nothing else. An FFN whose projections are anything else than ``Linear`` or
    ``Conv1D`` with ordinary parameters (an adapter, a quantised weight, a shard), or have hooks, is computed by its
    modules, as with ``dense-mask``. Weights that FSDP manages are not touched. Each forward pass looks for such
    changes, so none needs another call of this.

    Args:
        model: A converted model.
        backend: ``auto`` (by device and type), ``dense-mask`` (every expert is computed, then masked), ``reference``
            (slow and plain), ``cpu`` or ``triton``. What a backend cannot serve, the dense-mask path does, and the log
            says so once.

    Raises:
        UserError: If there is no such backend, or the model was not converted.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    ffns = require_expert_ffns(model).values()
    # FSDP gathers weights into memory of its own, in the order that it found
    sharded = {inner for module in model.modules() if is_sharded(module) for inner in module.modules()}
    for ffn in ffns:
        ffn.backend = backend
        if ffn not in sharded:
            lay_out(ffn.parts, by_neuron=backend != "dense-mask")

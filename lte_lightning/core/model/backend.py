"""`set_backend` requests a backend and lays out the weights for it. `kernels.dispatch` chooses at each call."""

from torch import nn

from lte_lightning.core.model.attention import use_attention
from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import require_expert_ffns
from lte_lightning.core.model.residual import use_sum_norms
from lte_lightning.core.model.storage import lay_out
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import BACKENDS, Backend


def set_backend(model: nn.Module, backend: Backend = "auto") -> None:
    """Sets the backend that computes the selected experts in hard mode without gradients.

    Every backend but ``dense-mask`` gets the weights with a row per neuron, in place, so that the down projection's
    parameter becomes a transposed view. Names, shapes and values stay the same, and so do state_dict, dense mode,
    training and saving. Nothing is stored twice. ``dense-mask`` undoes the layout, like `restore`, because torch
    multiplies few tokens by transposed bfloat16 weights at two thirds of the speed. Code that wants each parameter in
    one piece, like ``torch.nn.utils.parameters_to_vector``, needs ``dense-mask``.

    The kernels read only weights and biases. So an FFN's modules compute it, as with ``dense-mask``, if a projection
    has hooks or is no ``Linear`` or ``Conv1D`` with ordinary parameters (an adapter, a quantised weight, a shard).
    Weights that FSDP manages stay as they are. Each forward pass looks for such changes, so no change needs another
    call of this.

    With ``auto`` and ``cpu``, our kernels also compute attention (where torch's would, ``sdpa``) and the LayerNorms of
    residual sums of an encoder, on a CPU in bfloat16 and float16, where no gradient is needed.

    Args:
        model: A converted model.
        backend: ``auto`` (by device and type), ``dense-mask`` (computes every expert, then masks), ``reference`` (slow
            and plain), ``cpu`` or ``triton``. The dense-mask path takes over what a backend cannot serve, and the log
            says so once.

    Raises:
        UserError: If there is no such backend, or the model was not converted.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    ffns = require_expert_ffns(model).values()
    use_attention(model, backend in ("auto", "cpu"))
    use_sum_norms(model, backend in ("auto", "cpu"))
    # FSDP gathers weights into its own memory, in their original order.
    sharded = {inner for module in model.modules() if is_sharded(module) for inner in module.modules()}
    for ffn in ffns:
        ffn.backend = backend
        if ffn not in sharded:
            lay_out(ffn.parts, by_neuron=backend != "dense-mask")

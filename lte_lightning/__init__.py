"""lte-lightning: Learn To be Efficient, structured sparsity for Hugging Face transformers.

The public API: `convert` a model, train it (see the ``lightning`` command), `save_pretrained`, `from_pretrained`,
`restore`. `register` lets transformers' Auto classes load saved models sparse. `set_backend` chooses what computes the
selected experts. `set_sparsity` sets the sparsity of a calibrated model. `quantize` rounds weights to 8 or 4 bits, to
decode faster on a CPU; within `fused_decoding` such a model makes a token in one call. `equal_rows` makes a row's bits
independent of its batch. `RouterTrace` reads what the routers decide.
"""

from typing import TYPE_CHECKING

from lte_lightning.lazy import on_first_use

if TYPE_CHECKING:
    from lte_lightning.core.model.backend import set_backend
    from lte_lightning.core.model.config import LteConfig
    from lte_lightning.core.model.convert import convert, restore
    from lte_lightning.core.model.decoding import fused_decoding
    from lte_lightning.core.model.experts import set_mode
    from lte_lightning.core.model.loading import from_pretrained, register
    from lte_lightning.core.model.quantize import quantize
    from lte_lightning.core.model.saving import save_pretrained
    from lte_lightning.core.model.thresholds import set_sparsity
    from lte_lightning.core.routing.trace import RouterTrace
    from lte_lightning.kernels.equal_rows import equal_rows
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "core.model.loading": ["from_pretrained", "register"],
            "core.model.config": ["LteConfig"],
            "core.model.convert": ["convert", "restore"],
            "core.model.backend": ["set_backend"],
            "core.model.decoding": ["fused_decoding"],
            "core.model.experts": ["set_mode"],
            "core.model.quantize": ["quantize"],
            "core.model.saving": ["save_pretrained"],
            "core.model.thresholds": ["set_sparsity"],
            "core.routing.trace": ["RouterTrace"],
            "kernels.equal_rows": ["equal_rows"],
        },
    )

__version__ = "0.1.0"

__all__ = [
    "LteConfig",
    "RouterTrace",
    "convert",
    "equal_rows",
    "from_pretrained",
    "fused_decoding",
    "quantize",
    "register",
    "restore",
    "save_pretrained",
    "set_backend",
    "set_mode",
    "set_sparsity",
]

"""The module of a fit as our callbacks need it."""

from lightning.pytorch import LightningModule

from lte_lightning.errors import UserError
from lte_lightning.tasks.base import LteModule


def lte_module(module: LightningModule) -> LteModule:
    """Returns a fit's module, typed as one of ours.

    Raises:
        UserError: If it has no stages, or its steps are compiled: torchmetrics, which they call, cannot be.
    """
    if not isinstance(module, LteModule):
        raise UserError(f"{type(module).__name__} has no stages; fit one of lte_lightning.tasks, or derive from it")
    if getattr(module, "_compiler_ctx", None):
        raise UserError(
            "torch.compile of the whole module compiles its meters and logging, too, and fails there: compile the "
            "model alone, by module.configure_model() and module.net.compile(), and fit the module itself"
        )
    return module

"""The module of a fit as our callbacks need it."""

from lightning.pytorch import LightningModule

from lte_lightning.errors import UserError
from lte_lightning.tasks.base import LteModule


def lte_module(module: LightningModule) -> LteModule:
    """Returns a fit's module, typed as one of ours.

    Raises:
        UserError: If it has no stages.
    """
    if not isinstance(module, LteModule):
        raise UserError(f"{type(module).__name__} has no stages; fit one of lte_lightning.tasks, or derive from it")
    return module

"""Estimates a fit's memory before it starts."""

from lightning.pytorch import Trainer

from lte_lightning.core.accounting.memory import PRECISIONS, kept_per_weight, training_memory
from lte_lightning.core.model.exact import is_sharded
from lte_lightning.tasks.base import LteModule
from lte_lightning.trainer import declared


def expected_memory(trainer: Trainer, module: LteModule) -> str:
    """Describes the peak memory of a fit on one device, for texts of the greatest length that the data allow.

    The data give ``batch_size`` and ``max_length``. Without these the estimate leaves activations out. The optimizer is
    that of the fit's first stage.
    """
    precision, net = str(trainer.precision), module.net
    if precision not in PRECISIONS:
        return f"not known for precision {precision}"
    batch, length = (getattr(declared(trainer).datamodule, name, None) for name in ("batch_size", "max_length"))
    tokens = batch * length if batch and length else 0
    at = f"at most {batch} x {length} tokens" if tokens else "activations aside, as the length of a batch is unknown"
    checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in net.modules())
    saving = ", gradient checkpointing" if checkpointing else ""
    optimizer = trainer.optimizers[0]
    devices, sharded = trainer.world_size, is_sharded(net)
    memory = training_memory(net, tokens, precision, kept_per_weight(optimizer), devices=devices, sharded=sharded)
    listed = memory.describe(checkpointing, type(optimizer).__name__)
    return f"{listed}; {precision}{saving}, {at}"

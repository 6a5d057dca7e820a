"""With sharded weights (FSDP), all processes run the same number of batches, because they gather weights together."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import set_mode
from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import VIEW_MODES, MeasuredModule


def missing_batches(module: MeasuredModule, counts: Sequence[int | float]) -> list[int]:
    """Returns how many batches this process has fewer than the largest, of each loader; 0 without sharded weights.

    Args:
        module: What runs them.
        counts: The batches of each loader in this process.
    """
    if not is_sharded(module.net):
        return [0] * len(counts)
    mine = torch.tensor([int(count) for count in counts], device=module.device)
    most = module.trainer.strategy.reduce(mine.clone(), reduce_op="max")
    return [int(count) for count in most - mine]


class KeepPace(Callback):
    """Runs the last batch of a loader again, and measures nothing, where another process has more of them."""

    def __init__(self) -> None:
        self._missing: list[int] = []
        self._last: dict[int, Any] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Asks how many batches the others have."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._missing, self._last = missing_batches(pl_module, counts), {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Asks how many batches the others have."""
        self._missing, self._last = missing_batches(pl_module, trainer.num_test_batches), {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the batch, and catches up with loaders that are done."""
        self._catch_up(pl_module, dataloader_idx)
        self._last[dataloader_idx] = batch

    on_test_batch_start = on_validation_batch_start

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Catches up, before the module reads its meters."""
        self._catch_up(pl_module, len(self._missing))
        self._last = {}

    on_test_epoch_end = on_validation_epoch_end

    def _catch_up(self, module: MeasuredModule, loaders: int) -> None:
        for loader in range(loaders):
            while self._missing[loader]:
                self._missing[loader] -= 1
                if loader not in self._last:
                    raise UserError("there are fewer rows than devices; use fewer devices, or trainer.strategy ddp")
                for view in (module.test_view,) if module.trainer.testing else module.views:
                    set_mode(module.net, VIEW_MODES[view])
                    with module.trainer.precision_plugin.forward_context():
                        module.run_again(self._last[loader], loader)
                if not module.trainer.testing:
                    module.apply_stage()

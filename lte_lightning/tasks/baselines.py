"""What the baselines need of a training run: predictors that imitate, levels that are calibrated."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lte_lightning.core.errors import UserError
from lte_lightning.core.observe import calibrate, imitation_loss, rankings
from lte_lightning.tasks.evaluation import MeasuredModule, json_value

# Calibrated on so many tokens of the training rows; their neurons' importance is held in memory, a layer's 4 * F bytes
# each.
CALIBRATION_TOKENS = 4096


def imitate(module: MeasuredModule, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the loss of predictors on what the dense model does with a batch; the stage's mode is kept."""
    loss = imitation_loss(module.net, lambda: module.run_model(batch), batch["attention_mask"])
    module.apply_stage()
    return loss


def prepare_choice(module: MeasuredModule) -> None:
    """Calibrates a baseline on training rows, and measures it in hard mode before any adaptation.

    Raises:
        UserError: If several processes train: each would calibrate on its own rows.
    """
    if not rankings(module.net):
        return
    if module.trainer.world_size > 1:
        raise UserError(f"selector {module.net.lte_config.selector!r} is calibrated by one process: set devices to 1")
    was_training = module.training
    module.eval()
    loaders = module.trainer.datamodule.val_dataloader()
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        calibrate(module.net, _runs(module), CALIBRATION_TOKENS)
        for i, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            for batch in loader:
                module.measure("hard_before", _moved(module, batch), i)
    found = module.read_meters("hard_before")
    module.measured["hard_before"] = {key: json_value(value) for key, value in found.items()}
    module.train(was_training)
    module.apply_stage()
    rank_zero_info(
        f"before adaptation: {module.metric_name} {found[module.metric_name]:.4f}, sparsity {found['sparsity']:.4f}"
    )


def _runs(module: MeasuredModule) -> Iterator[tuple[Callable[[], object], torch.Tensor]]:
    for batch in module.trainer.datamodule.train_dataloader():
        here = _moved(module, batch)
        yield lambda here=here: module.run_model(here), here["attention_mask"]


def _moved(module: MeasuredModule, batch: dict[str, Any]) -> dict[str, Any]:
    return module.trainer.strategy.batch_to_device(batch)

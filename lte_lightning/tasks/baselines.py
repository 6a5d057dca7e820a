"""What the baselines need of a training run: predictors that imitate, levels that are calibrated."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lte_lightning.core.model.convert import groups_by_activation
from lte_lightning.core.routing.calibrate import calibrate, needs_calibration
from lte_lightning.core.routing.observe import (
    imitates,
    imitation_loss,
    learns_with_task,
    neuron_activations,
)
from lte_lightning.errors import UserError
from lte_lightning.selection import SELECTORS
from lte_lightning.tasks.evaluation import MeasuredModule, Stage, json_value

# Calibrated on, or grouped by, so many tokens of the training rows; their neurons' importance is held in memory, a
# layer's 4 * F bytes each (of TEAL the input, 4 * D; to group by, 2 * F).
CALIBRATION_TOKENS = 4096
ROWS_APART = 4  # one row of so many is looked at


def check_baseline(module: MeasuredModule, stages: Sequence[Stage]) -> None:
    """Checks that a fit through ``stages`` can train and calibrate the model's selectors.

    Raises:
        UserError: If not.
    """
    selector, calibrates = module.net.lte_config.selector, needs_calibration(module.net)
    if module.trainer.world_size > 1 and (calibrates or imitates(module.net)):
        raise UserError(f"selector {selector!r} learns and is calibrated in one process; set trainer.devices to 1")
    if module.trainer.world_size > 1 and module.stage == "dense" and groups_by_activation(module.net.lte_config):
        raise UserError("grouping 'coactivation' looks at activations in one process; set trainer.devices to 1")
    learners = sorted(name for name, kind in SELECTORS.items() if kind.learns_with_task())
    if not module.freeze_routers and not learns_with_task(module.net):
        raise UserError(
            f"freeze_routers is false, but selector {selector!r} does not learn with the task; only "
            f"{', '.join(learners[:-1])} and {learners[-1]} do"
        )
    if calibrates and module.stage != "expert" and stages[-1] == "router":
        raise UserError(
            f"selector {selector!r} is calibrated when the expert stage begins; give stages.expert epochs (with a "
            "learning_rate of 0 nothing is adapted)"
        )


def imitate(module: MeasuredModule, batch: dict[str, torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the loss of predictors on what the dense model does with a batch, without dropout, as it will be used.

    ``weights`` multiply the losses of each stack's layers.
    """
    was_training = module.net.training
    module.net.eval()
    loss = imitation_loss(module.net, lambda: module.run_model(batch), *module.token_masks(batch), weights=weights)
    module.net.train(was_training)
    module.apply_stage()
    return loss


def activations_to_group_by(module: MeasuredModule) -> list[torch.Tensor] | None:
    """Returns what the dense model's neurons do on training rows, if the experts are to be grouped by that."""
    if not groups_by_activation(module.net.lte_config):
        return None
    was_training = module.training
    module.eval()
    with module.trainer.precision_plugin.val_step_context():
        activations = neuron_activations(module.net, _runs(module), CALIBRATION_TOKENS)
    module.train(was_training)
    return activations


def prepare_choice(module: MeasuredModule) -> None:
    """Calibrates a selector on training rows, and measures it in hard mode before any adaptation.

    One that has learned with the task, and is not calibrated, was measured so by the router stage.
    """
    measured = learns_with_task(module.net) and not needs_calibration(module.net)
    if measured and "hard_before" in module.measured:
        return
    was_training = module.training
    module.eval()
    loaders = module.trainer.datamodule.val_dataloader() if module.trainer.limit_val_batches else []
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        calibrate(module.net, _runs(module), CALIBRATION_TOKENS)
        for i, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            limit = module.trainer.limit_val_batches
            count = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
            for batch in islice(loader, count):
                module.measure("hard_before", _moved(module, batch), i)
    module.train(was_training)
    module.apply_stage()
    if loaders:
        found = module.read_meters("hard_before")
        module.measured["hard_before"] = {key: json_value(value) for key, value in found.items()}
        rank_zero_info(
            f"before adaptation: {module.metric_name} {found[module.metric_name]:.4f}, sparsity {found['sparsity']:.4f}"
        )


def _runs(module: MeasuredModule) -> Iterator[tuple[Callable[[], object], tuple[torch.Tensor, ...]]]:
    """A part of each batch: batches are of rows alike in length, and a few of them are no sample."""
    for batch in module.trainer.datamodule.train_dataloader():
        here = _moved(module, {key: value[::ROWS_APART] for key, value in batch.items()})
        yield lambda here=here: module.run_model(here), module.token_masks(here)


def _moved(module: MeasuredModule, batch: dict[str, Any]) -> dict[str, Any]:
    return module.trainer.strategy.batch_to_device(batch)

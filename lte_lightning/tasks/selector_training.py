"""How a fit trains, starts and calibrates selectors, LTE's routers and baselines alike, beside their losses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn import functional

from lte_lightning.core.model.convert import groups_by_activation, lte_config
from lte_lightning.core.model.experts import set_mode
from lte_lightning.core.routing.calibrate import calibrate, needs_calibration
from lte_lightning.core.routing.observe import (
    imitates,
    imitation_loss,
    learns_with_task,
    neuron_activations,
    selectors,
    take_tokens,
)
from lte_lightning.core.routing.prune import Batch
from lte_lightning.core.routing.start import start_routers
from lte_lightning.core.routing.target_sparsity import controlled, shift_to_sparsity, wanted_sparsity
from lte_lightning.errors import UserError
from lte_lightning.results import json_value
from lte_lightning.selection import SELECTORS
from lte_lightning.tasks.equal_batches import missing_batches
from lte_lightning.tasks.evaluation import MeasuredModule, Stage
from lte_lightning.trainer import declared

T = TypeVar("T")

# Calibrated on, or grouped by, so many tokens of the training rows; their neurons' importance is held in memory, a
# layer's 4 * F bytes each (of TEAL the input, 4 * D; to group by, 2 * F).
CALIBRATION_TOKENS = 4096
START_TOKENS = 16_384  # a closed form is solved on so many
SETTLING = 3  # passes over these after an epoch: control has kept the sparsity near
ROWS_APART = 4  # one row of so many is looked at
ROUTER_OPTIONS = {"router_training": "soft", "router_start": "random", "detach_router": False, "sparsity_range": None}
"""How LTE's routers are trained: each option with the paper's value, which it has for another selector."""


def check_baseline(module: MeasuredModule, stages: Sequence[Stage]) -> None:
    """Checks that a fit through ``stages`` can train and calibrate the model's selectors.

    Raises:
        UserError: If not.
    """
    selector, calibrates = lte_config(module.net).selector, needs_calibration(module.net)
    in_one_process = calibrates and selectors(module.net)[0].calibrates() != "control"
    if module.trainer.world_size > 1 and (in_one_process or imitates(module.net)):
        raise UserError(f"selector {selector!r} learns and is calibrated in one process; set trainer.devices to 1")
    learners = sorted(name for name, kind in SELECTORS.items() if kind.learns_with_task())
    if not module.freeze_routers and not learns_with_task(module.net):
        raise UserError(
            f"freeze_routers is false, but selector {selector!r} does not learn with the task; only "
            f"{', '.join(learners[:-1])} and {learners[-1]} do"
        )
    _check_training(module)
    if calibrates and module.stage != "expert" and stages[-1] == "router":
        raise UserError(
            f"selector {selector!r} is calibrated when the expert stage begins; set stages.expert.epochs above 0 "
            "(with a learning_rate of 0 it only calibrates)"
        )


def _check_training(module: MeasuredModule) -> None:
    """Checks that options of how LTE's routers are trained can be met, and names them if there are no such routers."""
    config, options = lte_config(module.net), module.hparams
    target, sparsity_range = config.target_sparsity, options["sparsity_range"]
    changed = [f"{name} {options[name]}" for name, plain in ROUTER_OPTIONS.items() if options[name] != plain]
    if changed and not _has_routers(module):
        rank_zero_info(f"selector {config.selector!r} has none of LTE's routers; without effect: {', '.join(changed)}")
        return
    if not controlled(module.net) and (sparsity_range is not None or options["router_start"] != "random"):
        name = "sparsity_range" if sparsity_range is not None else "router_start closed-form"
        raise UserError(f"{name} needs a sparsity to begin from: set lte.target_sparsity")
    if sparsity_range is not None and not sparsity_range[0] <= target <= sparsity_range[1]:
        raise UserError(
            f"sparsity_range {sparsity_range} does not contain target_sparsity {target}, at which the model is measured"
        )


def set_router_options(module: MeasuredModule) -> None:
    """Gives the module its options of LTE's routers; with another selector they have their plain values."""
    for name, plain in ROUTER_OPTIONS.items():
        setattr(module, name, module.hparams[name] if _has_routers(module) else plain)


def _has_routers(module: MeasuredModule) -> bool:
    return selectors(module.net)[0].learns == "efficiency"


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
    if not groups_by_activation(lte_config(module.net)):
        return None
    tokens, summed = CALIBRATION_TOKENS // module.trainer.world_size, partial(_summed, module)
    with _evaluating(module):
        activations = neuron_activations(module.net, _sampled_runs(module), tokens, summed)
    return [_of_all_processes(module, own_FN) for own_FN in activations]


def _of_all_processes(module: MeasuredModule, own_FN: torch.Tensor) -> torch.Tensor:
    """Returns the columns of all processes side by side, on the CPU. Any backend sends bytes."""
    if module.trainer.world_size == 1:  # no copy, nor a way over the device
        return own_FN
    gather: Callable[[torch.Tensor], Any] = module.all_gather
    counts = gather(torch.tensor(own_FN.shape[1], device=module.device)).reshape(-1).tolist()
    padded_FN = functional.pad(own_FN, (0, max(counts) - own_FN.shape[1])).contiguous()
    sent = gather(padded_FN.view(torch.uint8).to(module.device)).cpu()
    parts = sent.view(own_FN.dtype).view(len(counts), *padded_FN.shape)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)


def on_first_process(module: MeasuredModule, work: Callable[[], T]) -> T:
    """Does a piece of work in the first process, and returns its result in every process.

    Raises:
        UserError: In every process, if the work raises one.
    """
    result: T | None = None
    why = ""
    if module.trainer.is_global_zero:
        try:
            result = work()
        except UserError as error:
            if module.trainer.world_size == 1:
                raise
            why = str(error)
    result, why = module.trainer.strategy.broadcast((result, why))
    if why:
        raise UserError(why)
    return result  # type: ignore[return-value]


def start_in_closed_form(module: MeasuredModule, stage: Stage) -> None:
    """Starts the routers from what the dense model does, at the sparsity that a stage begins with."""
    wanted = lte_config(module.net).target_sparsity or 0.0
    wanted = wanted_sparsity(wanted, 0.0) if stage == "router" else wanted
    with torch.no_grad(), _evaluating(module):
        summed = partial(_summed, module)
        batches = list(take_tokens(_sampled_runs(module), START_TOKENS // module.trainer.world_size, summed))
        start_routers(module.net, batches, summed)
        set_mode(module.net, "soft" if stage == "router" and module.router_training == "soft" else "hard")
        shift_to_sparsity(module.net, batches, wanted, summed)


def shift_to_target(module: MeasuredModule) -> torch.Tensor:
    """Holds a trained model at its target on training rows, as it will be used.

    Returns:
        By how much each layer's logits were moved, [L].
    """
    tokens, target = CALIBRATION_TOKENS // module.trainer.world_size, lte_config(module.net).target_sparsity or 0.0
    with torch.no_grad(), _evaluating(module):
        summed = partial(_summed, module)
        batches = list(take_tokens(_sampled_runs(module), tokens, summed))
        return shift_to_sparsity(module.net, batches, target, summed, SETTLING)


@contextmanager
def _evaluating(module: MeasuredModule) -> Iterator[None]:
    """Runs the module in eval mode and in the precision of a validation."""
    was_training = module.training
    module.eval()
    with module.trainer.precision_plugin.val_step_context():
        yield
    module.train(was_training)


def _summed(module: MeasuredModule, value: torch.Tensor) -> torch.Tensor:
    return module.trainer.strategy.reduce(value, reduce_op="sum")


def calibrate_and_measure(module: MeasuredModule) -> None:
    """Calibrates a selector on training rows, and measures it in hard mode before any adaptation.

    Does nothing if the selector learned with the task, needs no calibration, and was measured in the router stage.
    """
    measured = learns_with_task(module.net) and not needs_calibration(module.net)
    if measured and "hard_before" in module.measured:
        return
    loaders = declared(module.trainer).datamodule.val_dataloader() if module.trainer.limit_val_batches else []
    with torch.no_grad(), _evaluating(module):
        tokens = CALIBRATION_TOKENS // module.trainer.world_size
        calibrate(module.net, _sampled_runs(module), tokens, partial(_summed, module))
        for i, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            limit = module.trainer.limit_val_batches
            count = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
            (missing,) = missing_batches(module, [count])  # asked first: while one process runs a batch, all do
            for batch in islice(loader, count):
                module.measure("hard_before", _moved(module, batch), i)
            for _ in range(missing):  # the last batch again
                module.run_model(_moved(module, batch))
    module.apply_stage()
    if loaders:
        values = module.read_meters("hard_before")
        module.measured["hard_before"] = {key: json_value(value) for key, value in values.items()}
        name, sparsity = module.metric_name, values["sparsity"]
        rank_zero_info(f"before adaptation: {name} {values[name]:.4f}, sparsity {sparsity:.4f}")


def _sampled_runs(module: MeasuredModule) -> Iterator[Batch]:
    return sampled(module, declared(module.trainer).datamodule.train_dataloader(), partial(_moved, module))


def sampled(
    module: MeasuredModule, batches: Iterable[dict[str, Any]], move: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Batch]:
    """Yields every fourth row of each batch.

    Batches hold rows of similar length, so a few whole batches would be a biased sample.

    Args:
        module: What runs them.
        batches: Training rows.
        move: Brings a batch to the module's device.
    """
    for batch in batches:
        # T5 wants its labels in one piece
        part = {key: value[::ROWS_APART] for key, value in batch.items()}
        here = move({key: rows.contiguous() if isinstance(rows, torch.Tensor) else rows for key, rows in part.items()})
        yield partial(module.run_model, here), module.token_masks(here)


def _moved(module: MeasuredModule, batch: dict[str, Any]) -> dict[str, Any]:
    return module.trainer.strategy.batch_to_device(batch)

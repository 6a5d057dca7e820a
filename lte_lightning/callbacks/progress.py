"""Progress of a fit: a bar that names its stage, and a line for every epoch."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lte_lightning.bars import Bar, say
from lte_lightning.callbacks.module import lte_module
from lte_lightning.callbacks.stages import StageSchedule
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.trainer import declared


class StageProgressBar(TQDMProgressBar):
    """Lightning's bar, with the stage and its epoch in place of the epoch of the whole fit."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        if schedule := _schedule(trainer):
            self.train_progress_bar.set_description(_epoch_name(schedule, trainer.current_epoch))

    def init_sanity_tqdm(self) -> Any:
        """Makes the bar of the sanity check."""
        return self._bar(self.sanity_check_description)

    def init_train_tqdm(self) -> Any:
        """Makes the bar of an epoch."""
        return self._bar(self.train_description)

    def init_validation_tqdm(self) -> Any:
        """Makes the bar of a validation, below the epoch's if there is one."""
        return self._bar(self.validation_description, below=self.trainer.state.fn != "validate")

    def init_test_tqdm(self) -> Any:
        """Makes the bar of a test."""
        return self._bar(self.test_description)

    def init_predict_tqdm(self) -> Any:
        """Makes the bar of predictions."""
        return self._bar(self.predict_description)

    def _bar(self, description: str, below: bool = False) -> Bar:
        position = 2 * self.process_position + below
        return Bar(desc=description, position=position, leave=self._leave, disable=self.is_disabled, smoothing=0)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leaves out the version number, which an MLflow run does not have."""
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}


class EpochLines(Callback):
    """Prints the trained parts before a fit, and the validation's values after every epoch."""

    def __init__(self) -> None:
        self._began = 0.0

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = lte_module(pl_module).net
        ffns = list(expert_ffns(net).values())
        routers = sum(parameter.numel() for parameter in selector_parameters(net))
        weights = sum(parameter.numel() for parameter in net.parameters()) - routers
        name = type(net).__name__.removeprefix("FSDP")
        say(
            f"{name}: {weights / 1e6:.1f} M weights, {routers / 1e6:.2f} M in routers; "
            f"{len(ffns)} FFNs, the first of {ffns[0].experts} experts x {ffns[0].expert_size} neurons"
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get("train/loss")
        parts = [] if loss is None else [f"loss {loss:.4f}"]
        module = lte_module(pl_module)
        parts += [f"{view}: {said(module.measured.get(view, {}))}" for view in module.views]
        schedule = _schedule(trainer)
        name = _epoch_name(schedule, trainer.current_epoch) if schedule else f"epoch {trainer.current_epoch + 1}"
        say(f"{name}: {'; '.join(parts)} ({time.perf_counter() - self._began:.0f} s)")


def said(found: dict[str, Any]) -> str:
    """Returns a view's figures for a line; one that is undefined (a correlation of constants) has no number."""
    values = {key: value for key, value in found.items() if value is None or isinstance(value, float)}
    return ", ".join(f"{key} {'undefined' if value is None else f'{value:.4f}'}" for key, value in values.items())


def _schedule(trainer: Trainer) -> StageSchedule | None:
    return next((callback for callback in declared(trainer).callbacks if isinstance(callback, StageSchedule)), None)


def _epoch_name(schedule: StageSchedule, epoch: int) -> str:
    stage, done, epochs = schedule.place(epoch)
    return f"{stage} {done + 1}/{epochs}"

"""Options of stages and callbacks that a resumed fit was begun with, and that cannot change any more."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lte_lightning.callbacks.plan import StagePlan
from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import Stage
from lte_lightning.trainer import is_first_process

Settings = Mapping[Stage, Mapping[str, Any]]
# Read at every step; a checkpoint's optimizer brings the others of a stage that goes on
READ_LATER = ("warmup", "schedule", "final")
WAY_OUT = "leave it as it was, or begin from the weights alone, by --model.init_from RUN/model instead of --ckpt_path"


class KnowsReplaced(Callback):
    """Knows which options of the trainer's callbacks, like the patience of an EarlyStopping, a checkpoint replaced.

    Attributes:
        seed: The fit's seed.
    """

    seed = 0
    _given: tuple[tuple[Callback, dict[str, Any]], ...] = ()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the options. Lightning gives callbacks their states after all have had this call.

        Raises:
            UserError: If the fit was begun with another seed: it would go on with other rows.
        """
        seed = (
            checkpoint.get("callbacks", {}).get(self.state_key, {}).get("seed", self.seed)
        )  # none of an earlier version
        if trainer.training and seed != self.seed:
            raise UserError(
                f"seed_everything is {self.seed}, but {trainer.ckpt_path} was written with {seed}, in whose order its "
                f"rows were read; {WAY_OUT}"
            )
        self._given = tuple((callback, _options(callback)) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def replaced(self) -> list[str]:
        """Returns the replaced options, and the values that are used."""
        return [
            f"{type(callback).__name__}.{name} (the checkpoint's {used!r} is used)"
            for callback, given in self._given
            for name, value in given.items()
            if (used := getattr(callback, name, value)) != value
        ]


def _options(callback: Callback) -> dict[str, Any]:
    held = vars(callback)
    return {name: held[name] for name in inspect.signature(type(callback).__init__).parameters if name in held}


def settings(plan: StagePlan, optimizer: Optimizer, router_start: str, routers: bool) -> dict[str, Any]:
    """Returns what a stage optimises by: plain values, by the names of its options.

    Args:
        plan: The stage's plan.
        optimizer: One that the plan has made.
        router_start: How the routers start, on which their rate depends.
        routers: Whether the stage trains routers.
    """
    names = ["learning_rate", "weight_decay", *READ_LATER]
    values = {name: getattr(plan, name) for name in names}
    if routers:
        values["router_weight_decay"] = plan.router_weight_decay
        values["router_learning_rate"] = plan.router_rate(router_start)
    values["optimizer"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    own = {name: value for name, value in optimizer.defaults.items() if name not in ("lr", "weight_decay")}
    return values | {f"optimizer.{name}": _plain(value) for name, value in own.items()}


def check_settings(
    used: Settings, now: Settings, current: Stage | None, switches: bool, path: object, replaced: list[str]
) -> None:
    """Names the changed options of stages that are over, and refuses those that the current stage would not read.

    Args:
        used: The `settings` by which the checkpoint's stages were trained; none of an earlier version.
        now: The `settings` of this fit's stages.
        current: The stage that the fit goes on with; None if all are over or to begin.
        switches: Whether a stage is yet to begin.
        path: The checkpoint.
        replaced: Other options without effect, which are named as well.

    Raises:
        UserError: If the checkpoint's optimizer would replace an option of the current stage.
    """
    over = list(replaced)
    for stage, before in used.items():
        changed = {name: value for name, value in before.items() if now[stage].get(name, value) != value}
        if "keep_optimizer" in changed:
            del changed["keep_optimizer"]
            if not switches and (named := "stages.keep_optimizer (every stage has begun)") not in over:
                over.append(named)
        if stage != current:
            over += [f"stages.{stage}.{name} (the {stage} stage is over)" for name in changed]
            continue
        for name, value in changed.items():
            if name not in READ_LATER:
                raise UserError(
                    f"stages.{stage}.{name} is {now[stage][name]!r}, but {path} was written with {value!r}, which "
                    f"would be used until the {stage} stage ends; {WAY_OUT}"
                )
    if over and is_first_process():
        print(f"options that have no effect here: {'; '.join(over)}", file=sys.stderr)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)

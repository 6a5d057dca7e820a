"""Plans of the stages: their lengths, optimizers and epochs."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import AdamW, Optimizer

from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import STAGES, Stage

_MOST_EPOCHS = 100_000  # of a stage
_STREAM_EPOCH = 1000  # batches of a stream, after which it is validated and saved

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]  # of parameters, or groups of them


@dataclass(frozen=True)
class StagePlan:
    """Length and optimisation of one stage.

    Args:
        epochs: Passes over the training data; 0 skips the stage.
        steps: Optimizer steps, instead of ``epochs`` passes; the data is repeated as needed, and validated after each
            pass and at the stage's end. Of a stream, ``trainer.limit_train_batches`` batches are a pass, 1000 by
            default.
        learning_rate: Peak rate of the model's weights.
        weight_decay: Weight decay of the model's weights.
        router_learning_rate: Peak rate of the routers, a group of their own, where they are trained. None is 0.01, the
            authors' rate for routers that start at random, and 1e-4 for those that start in closed form: at 0.01 they
            would lose their start (docs/results.md).
        router_weight_decay: Weight decay of the routers.
        warmup: Share of the stage in which the rates rise linearly from 0.
        schedule: ``linear`` decay from the peak to ``final`` at the stage's end, or ``constant``.
        final: Share of the peak rates that is left at the end of a linear decay. With what is left as the next stage's
            peak, and no warmup there, one decay goes through both.
        optimizer: Optimizer class; its rates come from the fields above.
    """

    epochs: int = 3
    steps: int | None = None
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    router_learning_rate: float | None = None
    router_weight_decay: float = 0.1
    warmup: float = 0.06
    schedule: str = "linear"
    final: float = 0.0
    optimizer: OptimizerFactory = AdamW

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.steps is not None and self.steps < 0):
            raise UserError(f"a stage cannot last epochs={self.epochs}, steps={self.steps}; use 0 to skip it")
        for name in ("learning_rate", "weight_decay", "router_learning_rate", "router_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise UserError(f"{name} is {value}; it must be 0 or more, and finite")
        if self.schedule not in ("linear", "constant"):
            raise UserError(f"unknown schedule {self.schedule!r}; there are linear and constant")
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"warmup is {self.warmup}; it is a share of the stage, 0 <= warmup < 1")
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"final is {self.final}; it is a share of the peak rates, 0 <= final <= 1")

    @property
    def skipped(self) -> bool:
        """Says whether the stage is left out."""
        return self.epochs == 0 or self.steps == 0

    def router_rate(self, start: str) -> float:
        """Returns the peak rate of routers that start ``random`` or in ``closed-form``."""
        if self.router_learning_rate is not None:
            return self.router_learning_rate
        return 1e-4 if start == "closed-form" else 0.01

    def length(self, per_pass: int, accumulate: int) -> int:
        """Returns how many optimizer steps the stage has.

        Args:
            per_pass: Batches in a pass over the data.
            accumulate: Batches in an optimizer step.
        """
        if self.skipped:
            return 0
        return self.epochs * math.ceil(per_pass / accumulate) if self.steps is None else self.steps

    def factor(self, step: int, steps: int) -> float:
        """Returns the share of the peak rates at one of a stage's steps."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return step / warmup
        if self.schedule == "constant":
            return 1.0
        left = max(0.0, (steps - step) / max(steps - warmup, 1))
        return self.final + (1.0 - self.final) * left


@dataclass(frozen=True)
class Epoch:
    """One epoch of a fit: a pass over the training data, or a part of a pass.

    Args:
        stage: The stage that it belongs to.
        number: Its number in the stage, from 0.
        batches: Its batches.
        order: Seeds the order of the pass: the `key` of the epoch that began it.
        start: Batches of the pass that earlier epochs have taken.
        seen: Batches of all earlier epochs that the model has learned from.
    """

    stage: Stage
    number: int
    batches: int
    order: int
    start: int
    seen: int

    @property
    def key(self) -> int:
        """The stage and the number in it as one number, the same in one fit and in one fit per stage."""
        return _key(self.stage, self.number)


def batches_per_pass(plans: Mapping[Stage, StagePlan], limit: int | float, length: int | None) -> int:
    """Returns how many batches an epoch of whole passes has.

    Args:
        plans: The plan of every stage.
        limit: ``trainer.limit_train_batches``, a number or a share.
        length: Batches of the data; None of a stream.

    Raises:
        UserError: If the limit leaves none, or a stream would never end.
    """
    if length is None and not isinstance(limit, int):
        if limit != 1.0:
            raise UserError(f"limit_train_batches is {limit}, a share of an endless stream; give a whole number")
        for stage, plan in plans.items():
            if plan.steps is None and not plan.skipped:
                raise UserError(
                    f"the {stage} stage is to last epochs, but a stream of rows never ends; give "
                    f"stages.{stage}.steps, or say by trainer.limit_train_batches how many batches an epoch has"
                )
        return _STREAM_EPOCH
    batches = int(min(length or limit, limit) if length is None or isinstance(limit, int) else length * limit)
    if batches < 1:
        raise UserError(f"limit_train_batches {limit} leaves none of the {length} training batches; raise it")
    return batches


def lay_out(
    plans: Mapping[Stage, StagePlan], per_pass: int, accumulate: int, goes_on: bool, imitating: bool
) -> list[Epoch]:
    """Returns the epochs of a fit.

    A stage in epochs begins with a new pass. One in steps goes on with what earlier stages have left of the last pass.

    Args:
        plans: The plan of every stage.
        per_pass: Batches in a pass.
        accumulate: Batches in an optimizer step; the last step of an epoch takes what is left.
        goes_on: Whether the data can be begun within a pass; if not, every stage begins with a new one.
        imitating: In the router stage predictors learn alone, so the expert stage goes on where the model has stopped.

    Raises:
        UserError: A stage has too many passes.
    """
    epochs: list[Epoch] = []
    order = start = seen = 0
    for stage in (stage for stage in STAGES if not plans[stage].skipped):
        before = order, start, seen
        if plans[stage].steps is None or not goes_on:
            start = 0
        number, left = 0, plans[stage].length(per_pass, accumulate)
        if left * accumulate >= per_pass * _MOST_EPOCHS:
            raise UserError(f"the {stage} stage is too long: it would have {_MOST_EPOCHS:,} epochs or more; shorten it")
        while left > 0:
            if start == 0:
                order = _key(stage, number)
            batches = min(per_pass - start, left * accumulate)
            epochs.append(Epoch(stage, number, batches, order, start, seen))
            seen += batches
            start = (start + batches) % per_pass
            left -= math.ceil(batches / accumulate)
            number += 1
        if stage == "router" and imitating:
            order, start, seen = before
    return epochs


def _key(stage: Stage, number: int) -> int:
    return STAGES.index(stage) * _MOST_EPOCHS + number


def require_same(
    done: list[list[Any]] | None,
    by: tuple[int, ...],
    now: list[list[Any]],
    now_by: tuple[int, ...],
    within: bool,
    path: object,
) -> None:
    """Checks that a fit can go on from a checkpoint: its epochs were laid out as these are.

    Another number of devices may go on, if the steps remain what they were. A schedule counts steps, so their size may
    change between stages alone.

    Args:
        done: Of each epoch before the checkpoint the stage, batches of a device, those of the pass before it, and of
            the fit; None of an earlier version.
        by: Devices, and batches to a step of each, of the fit that wrote it.
        now: The epochs as this fit lays them out.
        now_by: As ``by``, of this fit.
        within: Whether the checkpoint was written within a stage.
        path: The checkpoint.

    Raises:
        UserError: If they were not.
    """
    alike = done == now
    others = by[0] != now_by[0]
    if done is not None and (others or within) and by[0] * by[1] != now_by[0] * now_by[1]:
        raise UserError(
            f"{path} was written with {by[0]} devices and {by[1]} batches of each to a step, and now there are "
            f"{now_by[0]} and {now_by[1]}; keep their product, by trainer.accumulate_grad_batches"
        )
    if done is not None and others:
        # passes are rounded up to whole batches of every device
        most = max(by[0], now_by[0]) - 1
        alike = len(done) == len(now) and all(
            old[0] == new[0]
            and abs(old[1] * by[0] - new[1] * now_by[0]) <= most
            and old[2] * by[0] == new[2] * now_by[0]
            for old, new in zip(done, now, strict=True)
        )
    if not alike:
        raise UserError(
            f"{path} was written by a fit of other stages, batches or data, or by an earlier version; "
            "resume with the options that it was begun with, or begin anew without it"
        )

"""When a run moves from stage to stage, and how each one optimises."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lte_lightning.callbacks.handover import hand_over, rewrap
from lte_lightning.callbacks.module import lte_module
from lte_lightning.callbacks.plan import Epoch, StagePlan, batches_per_pass, lay_out, require_same
from lte_lightning.callbacks.resumed import KnowsReplaced, check_settings, settings
from lte_lightning.callbacks.strategy import NAME, ShardedStrategy
from lte_lightning.core.model.convert import lte_config, selector_parameters
from lte_lightning.core.routing.observe import imitates, learns
from lte_lightning.errors import UserError
from lte_lightning.tasks.accumulation import StepLoader
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.evaluation import STAGES, Stage
from lte_lightning.tasks.selector_training import check_baseline
from lte_lightning.trainer import declared


class StageSchedule(KnowsReplaced):
    """Runs the stages one after the other in one fit: dense fine-tuning, routers with the model, adaptation.

    Each stage starts with a fresh optimizer and schedule. A stage given in epochs begins a new pass over the data; a
    stage given in steps continues the last pass where it stopped; streams always continue. Randomness restarts with
    every epoch from the seed, the stage and the epoch in the stage, so a resumed run repeats an uninterrupted one
    exactly. So does one fit per stage, if its stages are whole passes and it reads no stream.

    Args:
        dense: Fine-tuning of the plain model; skip it when starting from a fine-tuned one.
        router: Routers and model train together, all experts run, weighted by their scores (the LTE paper's stage 1).
        expert: Only selected experts run; routers are frozen unless the model says otherwise (the paper's stage 2).
        seed: Seed of data order and dropout; the command line sets it to ``seed_everything``.
        keep_optimizer: Start a stage with the last stage's optimizer state of the same weights (Adam's moments, in the
            order of regrouped neurons), instead of a fresh one.
    """

    def __init__(
        self,
        dense: StagePlan = StagePlan(),
        router: StagePlan = StagePlan(),
        expert: StagePlan = StagePlan(),
        seed: int = 0,
        keep_optimizer: bool = False,
    ) -> None:
        self.plans: dict[Stage, StagePlan] = {"dense": dense, "router": router, "expert": expert}
        if all(plan.skipped for plan in self.plans.values()):
            raise UserError("all three stages are skipped; give one of them epochs or steps")
        self.seed = seed
        self.keep_optimizer = keep_optimizer
        self.seconds: dict[str, float] = {}
        self._per_pass = 0
        self._goes_on = False
        self._reads_ahead = False
        self._most = -1
        self._epochs: list[Epoch] = []
        self._start_step = 0
        self._next_epoch = 0
        self._done: list[list[Any]] | None = None  # epochs, by the checkpoint that is resumed
        self._by: tuple[int, ...] = (1, 1)
        self._written_by = self._by  # devices, and batches to a step of each; of that checkpoint
        self._used: dict[Stage, dict[str, Any]] = {}  # settings of the stages begun so far
        self._epoch_began = 0.0

    @property
    def stages(self) -> list[Stage]:
        """The stages that are not skipped, in order."""
        return [stage for stage in STAGES if not self.plans[stage].skipped]

    # Length

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the trainer can switch stages, lays them out over epochs, and tells it how long the fit is."""
        if stage != "fit":
            return
        module, data = lte_module(pl_module), declared(trainer).datamodule
        module.schedule = self
        if data is None:
            raise UserError("StageSchedule needs its data from a LightningDataModule: trainer.fit(module, datamodule)")
        if trainer.check_val_every_n_epoch != 1:
            raise UserError(
                "every epoch is validated, to know each stage's figures: leave check_val_every_n_epoch at 1"
            )
        several = isinstance(trainer.strategy, ParallelStrategy)
        if several and not isinstance(trainer.strategy, DDPStrategy | ShardedStrategy):
            raise UserError(
                f"stages cannot be switched under {type(trainer.strategy).__name__}: use trainer.strategy ddp, where "
                f"every device holds the model, or {NAME}, where each holds a part"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in declared(trainer).callbacks):
            raise UserError(
                "GradientAccumulationScheduler would change how many steps a stage has; use "
                "trainer.accumulate_grad_batches, which holds for the whole fit"
            )
        self._accumulate = trainer.accumulate_grad_batches
        self._by = self._written_by = (trainer.world_size, self._accumulate)
        loader = data.train_dataloader()
        self._goes_on = hasattr(getattr(loader, "batch_sampler", None), "begin")
        self._per_pass = batches_per_pass(self.plans, trainer.limit_train_batches, sized_len(loader))
        self._most = -1 if trainer.max_epochs is None else trainer.max_epochs
        self._lay_out(trainer, imitating=False)
        if any(plan.steps for plan in self.plans.values()):
            declared(trainer).reload_dataloaders_every_n_epochs = 1  # so that a stage's last epoch can be cut short
        if self._accumulate > 1:
            self._read_ahead(trainer, module)

    def _read_ahead(self, trainer: Trainer, module: LteModule) -> None:
        data = declared(trainer).datamodule
        make = data.train_dataloader

        def train_dataloader() -> StepLoader:
            return StepLoader(make(), module.amounts, self._accumulate, lambda: int(trainer.limit_train_batches))

        data.train_dataloader = train_dataloader
        self._reads_ahead = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str | None = None) -> None:
        """Gives the data module its own loader back."""
        if self._reads_ahead:
            del declared(trainer).datamodule.train_dataloader
            self._reads_ahead = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the data module its own loader back."""
        self.teardown(trainer, pl_module)

    def _lay_out(self, trainer: Trainer, imitating: bool) -> None:
        self._epochs = lay_out(self.plans, self._per_pass, self._accumulate, self._goes_on, imitating)
        total = len(self._epochs)
        # -1, the command line's default, leaves the length to the stages; any other value is an upper limit
        trainer.fit_loop.max_epochs = total if self._most == -1 else min(total, self._most)
        shortest, every = min(self._epochs, key=lambda epoch: epoch.batches), trainer.val_check_interval
        if isinstance(every, int) and every > shortest.batches:
            raise UserError(
                f"val_check_interval is {every}, but the {shortest.stage} stage has an epoch of {shortest.batches} "
                "batches, after which it is validated anyway; leave val_check_interval, or give it as a share (0.5)"
            )

    def _epoch(self, epoch: int) -> Epoch:
        return self._epochs[min(epoch, len(self._epochs) - 1)]

    def place(self, epoch: int) -> tuple[Stage, int, int]:
        """Returns the stage that an epoch of the fit belongs to, its epoch in that stage (from 0), and of how many."""
        now = self._epoch(epoch)
        return now.stage, now.number, sum(each.stage == now.stage for each in self._epochs)

    def _prepare(self, trainer: Trainer, epoch: int) -> None:
        trainer.limit_train_batches = self._epoch(epoch).batches
        # Lightning takes the first batch of a stream before the epoch begins
        data = declared(trainer).datamodule
        if hasattr(data, "begin"):
            data.begin(self._epoch(epoch).seen)

    def steps(self, stage: Stage) -> int:
        """Returns the number of optimizer steps of a stage."""
        return self.plans[stage].length(self._per_pass, self._accumulate)

    # Switching

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the model fits the stages: it has not passed the first one, unless this resumes a fit."""
        module = lte_module(pl_module)
        if imitates(module.net):
            self._lay_out(trainer, imitating=True)
        if trainer.ckpt_path is not None:
            # a stage goes on, unless the next epoch begins one
            current = next((epoch.stage for epoch in self._epochs[self._next_epoch :][:1] if epoch.number), None)
            now = self._now(self._next_epoch)
            require_same(self._done, self._written_by, now, self._by, current is not None, trainer.ckpt_path)
            plans = {name: self._settings(module, name, self._optimizer(module, name)) for name in self._used}
            switches = any(epoch.number == 0 for epoch in self._epochs[self._next_epoch :])
            check_settings(self._used, plans, current, switches, trainer.ckpt_path, self.replaced())
        self._prepare(trainer, self._next_epoch)
        if "router" in self.stages and not learns(module.net):
            selector = lte_config(module.net).selector
            raise UserError(f"selector {selector!r} has nothing to train; set stages.router.epochs to 0")
        check_baseline(module, self.stages)
        if trainer.ckpt_path is not None:
            trainer.num_sanity_val_steps = 0  # it would measure a stage that is over on a few rows
            return
        if STAGES.index(module.stage) > STAGES.index(self.stages[0]):
            raise UserError(
                f"the model is in stage {module.stage!r} already, and the fit would begin with {self.stages[0]!r}; "
                f"set stages.{self.stages[0]}.epochs to 0"
            )
        if self.stages[0] != "dense" or module.stage != "dense":
            trainer.num_sanity_val_steps = float("inf")  # measures what the fit starts from
        if self.stages[0] == "expert" and module.stage == "dense" and learns(module.net):
            rank_zero_warn("the router stage is skipped: the routers are as they were initialised")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a checkpoint taken in the middle of an epoch, whose data order could not be continued."""
        self._epoch_began = time.perf_counter()
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch:
            raise UserError(f"{trainer.ckpt_path} was written in mid-epoch; resume from last.ckpt, written after one")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the stage that this epoch belongs to, and chooses the order of its data."""
        self._epoch_began = time.perf_counter()
        module, now = lte_module(pl_module), self._epoch(trainer.current_epoch)
        ahead = STAGES.index(now.stage) - STAGES.index(module.stage)
        # A fit may begin in the stage that the model was saved in. That stage gets a fresh optimizer, too
        if ahead > 0 or (ahead == 0 and now.number == 0):
            groups = module.stage == "dense" and ahead > 0
            known = dict(trainer.optimizers[0].state) if self.keep_optimizer and ahead > 0 else {}
            orders = module.enter_stage(now.stage)
            self._start_step = trainer.global_step
            rewrap(trainer)
            trainer.strategy.setup_optimizers(trainer)
            hand_over(known, trainer.optimizers[0], module.net, orders)
            if groups:
                self._add_seconds("grouping", self._epoch_began)
                self._epoch_began = time.perf_counter()
        optimizer = trainer.optimizers[0]
        self._used[now.stage] = self._settings(module, now.stage, optimizer, len(optimizer.param_groups) > 1)
        sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
        if self._goes_on and sampler is not None:
            sampler.begin(now.order, now.start)
        elif sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(now.key)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds the epoch, and tells the module how far the stage has come."""
        # Too early at the start of the epoch: the data loader's iterator still draws a number
        if batch_idx == 0:
            key = self._epoch(trainer.current_epoch).key
            torch.manual_seed((self.seed * 1_000_003 + key) * 1_009 + trainer.global_rank)
        done = trainer.global_step - self._start_step
        module = lte_module(pl_module)
        module.stage_progress = done / max(self.steps(module.stage), 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the stage's time, and sets the length of the next epoch."""
        self._add_seconds(lte_module(pl_module).stage, self._epoch_began)
        self._next_epoch = trainer.current_epoch + 1
        self._prepare(trainer, self._next_epoch)

    def _add_seconds(self, what: str, since: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since

    def _now(self, epoch: int) -> list[list[Any]]:
        return [[done.stage, done.batches, done.start, done.seen] for done in self._epochs[:epoch]]

    def state_dict(self) -> dict[str, Any]:
        """Where the current stage began, the epochs that are done, and the time spent so far."""
        state = {"start_step": self._start_step, "next_epoch": self._next_epoch, "seconds": dict(self.seconds)}
        begun = {done.stage for done in self._epochs[: self._next_epoch]}
        used = {stage: used for stage, used in self._used.items() if stage in begun}
        return state | {"done": self._now(self._next_epoch), "by": list(self._by), "used": used, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes where the checkpoint left off."""
        self._start_step = state_dict["start_step"]
        self._next_epoch = state_dict["next_epoch"]
        self.seconds = dict(state_dict["seconds"])
        self._done = state_dict.get("done")
        self._written_by = tuple(state_dict.get("by", self._by))
        self._used = dict(state_dict.get("used", {}))  # none of an earlier version

    # Optimisation

    def _settings(self, module: LteModule, stage: Stage, optimizer: Optimizer, routers: bool = True) -> dict[str, Any]:
        used = settings(self.plans[stage], optimizer, module.router_start, routers)
        return used | {"keep_optimizer": self.keep_optimizer}

    def _optimizer(self, module: LteModule, stage: Stage) -> Optimizer:
        plan = self.plans[stage]
        routers = list(selector_parameters(module.net))
        inside = {id(parameter) for parameter in routers}
        body = [p for p in module.net.parameters() if id(p) not in inside and p.requires_grad]
        groups = [{"params": body, "lr": plan.learning_rate, "weight_decay": plan.weight_decay, "name": "model"}]
        if module.routers_learn and routers:
            rates = {"lr": plan.router_rate(module.router_start), "weight_decay": plan.router_weight_decay}
            groups.append({"params": routers, **rates, "name": "routers"})
        return plan.optimizer(groups)

    def configure_optimizers(self, module: LteModule) -> dict[str, Any]:
        """Builds the current stage's optimizer: the model's weights, and the routers' own group while they learn."""
        plan, optimizer = self.plans[module.stage], self._optimizer(module, module.stage)
        mixed = isinstance(module.trainer.precision_plugin, MixedPrecision)
        if mixed and getattr(optimizer, "_step_supports_amp_scaling", False) and module.trainer.gradient_clip_val:
            raise UserError(
                "gradient_clip_val and a fused optimizer exclude each other in Lightning's mixed precision; set "
                f"stages.{module.stage}.optimizer.init_args.fused to false"
            )
        steps = self.steps(module.stage)
        scheduler = LambdaLR(optimizer, lambda step: plan.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

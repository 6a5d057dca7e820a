"""The shared core of all tasks: an HF model with expert FFNs, its stages, losses and measurements."""

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import group_experts, lte_config
from lte_lightning.core.model.grouping import Grouping
from lte_lightning.core.model.names import own_names
from lte_lightning.core.model.quantize import Quantization
from lte_lightning.core.routing.losses import SEPARABILITY_EPSILON
from lte_lightning.core.routing.observe import imitates
from lte_lightning.core.routing.prune import hold_zeros
from lte_lightning.data.packaged import resolve
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.tasks import selector_training
from lte_lightning.tasks.distillation import Distillation
from lte_lightning.tasks.evaluation import Stage
from lte_lightning.tasks.router_loss import RouterLosses
from lte_lightning.tasks.starting_model import check_checkpoint, give_experts, load
from lte_lightning.tasks.target_sparsity import SparsityControl


class LteModule(RouterLosses):
    """A model in one of LTE's stages; a subclass adds the task.

    Args:
        task: Name of the task, for the results; the command line takes it from the data.
        pretrained: Model to start from: a folder, a hub id, or ``package://...`` (see the quickstart).
        init_from: Take the weights from here instead: a fine-tuned model with the same tokenizer (folder or hub id), or
            the ``model`` folder of an earlier run, which goes on in the stage it had reached.
        lte: Experts and routers. Default: the paper's choices, or those of an LTE model given by ``init_from``.
        efficiency_weight: eta, the weight of the efficiency loss, which sets sparsity (paper: 0 to 2). By default
            0.5, or 0 where ``lte.target_sparsity`` is held instead.
        separability_weight: lambda, the weight that the separability loss ends with.
        separability_start: Share of the router stage after which lambda begins to grow from 0. With 0 here and in
            ``separability_end``, lambda is constant, as in the LTE paper (arXiv 2402.06126).
        separability_end: Share of the router stage at which lambda is reached; it grows linearly in between.
        separability_epsilon: Keeps the separability loss finite (see ``core/routing/losses.py``).
        balance_weight: Factor of the balance loss of ``softmax`` and ``sigmamoe``; 1 is their authors' weight.
        distillation: Weight w, 0 to 1, of the divergence from a dense ``teacher`` in the router and the expert stage:
            the loss is (1 - w) * task loss + w * divergence.
        teacher: The dense model to learn from, a folder or a hub id with the same outputs; by default the model as it
            is when the router stage begins.
        freeze_routers: Leave the routers as they are in the expert stage (the paper). ``false`` trains them on, with
            the router stage's loss at its full weights and a straight-through gradient (Bengio, Léonard,
            Courville 2013, arXiv 1308.3432).
        router_training: How the router stage runs: ``soft``, all experts weighted by their scores (the paper), or
            ``straight-through``, the selected experts alone, with the gradient of that paper.
        router_start: Routers begin ``random`` (the paper), or in ``closed-form``, as a regression of what each expert
            does on training rows (``core/routing/start.py``); needs ``lte.target_sparsity``.
        detach_router: Stop the routers' gradient at the FFN's input; the body then learns from the task loss alone.
        sparsity_range: [low, high]: each training step in hard mode draws a sparsity from it, so that one model serves
            the range after ``lte calibrate``. Needs ``lte.target_sparsity``, at which validation measures.
        activation: Swap a plain model's activation for this one before fine-tuning (``relu`` for MoEfication).
        layers: Keep only this many layers, the first ones, of a plain model (of encoder and decoder alike).
        gradient_checkpointing: Keep fewer activations, and compute them again in the backward pass: slower.
        seed: Seed of the grouping and of the routers, unless ``lte`` has its own; by default ``seed_everything``.
        backend: What computes the selected experts in ``test`` and ``predict``: ``auto``, ``dense-mask``,
            ``reference``, ``cpu`` or ``triton`` (see `set_backend`).
        skip_experts: In the expert stage on a CPU, compute selected experts alone wherever that is expected to be
            faster, for the same gradients. If false, training and validation compute all experts, and mask.
        sparsity: FFN sparsity in ``validate``, ``test`` and ``predict`` of a model calibrated by ``lte calibrate``; by
            default the saved one. Not for a fit, which has ``lte.target_sparsity``.
        quantize: Round the weights for ``test`` and ``predict`` on a CPU, ``int8`` or ``int4``.
    """

    def __init__(
        self,
        task: str,
        pretrained: str,
        init_from: str | None = None,
        lte: LteConfig | None = None,
        efficiency_weight: float | None = None,
        separability_weight: float = 0.5,
        separability_start: float = 0.5,
        separability_end: float = 1.0,
        separability_epsilon: float = SEPARABILITY_EPSILON,
        balance_weight: float = 1.0,
        distillation: float = 0.0,
        teacher: str | None = None,
        freeze_routers: bool = True,
        router_training: Literal["soft", "straight-through"] = "soft",
        router_start: Literal["random", "closed-form"] = "random",
        detach_router: bool = False,
        sparsity_range: tuple[float, float] | None = None,
        activation: str | None = None,
        layers: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
        sparsity: float | None = None,
        skip_experts: bool = True,
        quantize: Quantization | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= separability_start <= separability_end <= 1.0:
            raise UserError(
                f"separability_start {separability_start} and separability_end {separability_end} are shares of the "
                "router stage: 0 <= start <= end <= 1"
            )
        if lte is not None and lte.selector == "router" and lte.has_target and efficiency_weight:
            name, target = lte.budget or ("sparsity", lte.target_sparsity)
            raise UserError(
                f"lte.target_{name} {target} and efficiency_weight {efficiency_weight} both set the sparsity; set one "
                "of them (--model.efficiency_weight null unsets the second)"
            )
        for name, value, known in (
            ("router_training", router_training, ("soft", "straight-through")),
            ("router_start", router_start, ("random", "closed-form")),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; there are {' and '.join(known)}")
        weights = {
            "efficiency_weight": efficiency_weight or 0.0,
            "separability_weight": separability_weight,
            "balance_weight": balance_weight,
        }
        for name, weight in (weights | {"separability_epsilon": separability_epsilon}).items():
            if not 0.0 <= weight < math.inf:
                raise UserError(f"{name} is {weight}; it must be a finite number, and not negative")
        # or a checkpoint's values would replace the command line's
        self.save_hyperparameters(ignore=["lte", "backend", "sparsity", "skip_experts", "quantize", "sparsity_range"])
        kept_range = None if sparsity_range is None else list(sparsity_range)  # checkpoints hold plain types
        self.save_hyperparameters({"lte": asdict(lte) if lte else None, "sparsity_range": kept_range})
        self.lte = replace(lte, seed=seed) if lte and lte.seed is None else lte
        self.backend, self.skip_experts, self.set_to, self.quantize = backend, skip_experts, sparsity, quantize
        self.freeze_routers = freeze_routers
        self.stage: Stage = "dense"
        self.stage_progress = 0.0
        self.measured: dict[str, dict[str, Any]] = {}
        self.predictions: list[dict[str, Any]] = []  # of a test that generates, one entry per example
        self.samples: list[dict[str, Any]] = []  # answers to read, until they are written
        self.schedule: Any = None
        self.step_amounts = torch.zeros(0)
        self.step_losses: dict[str, torch.Tensor] = {}
        self.control = SparsityControl(sparsity_range)
        self._distillation = Distillation(distillation, teacher)

    # The task, by the subclass

    @property
    def auto_class(self) -> Any:
        """The task's class of models."""
        raise TypeError(f"{type(self).__name__} must define auto_class")

    def model_arguments(self) -> dict[str, Any]:
        """Returns the task's arguments of ``from_pretrained``."""
        return {}

    def before_export(self) -> None:
        """Hook before export, for example to merge LoRA."""

    # Model and stages

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return resolve(self.hparams["init_from"] or self.hparams["pretrained"])

    def configure_model(self) -> None:
        """Loads the model and gives it experts; its weights are grouped only when the router stage begins."""
        if self.is_loaded:
            return
        names = ("activation", "layers", "from_scratch")
        changes = {name: self.hparams[name] for name in names if self.hparams.get(name) is not None}
        self.net, about = load(
            self.auto_class, self.source, self.model_arguments(), self.lte, self.hparams["seed"], **changes
        )
        if self.hparams["gradient_checkpointing"]:
            name = "activation_checkpointing_enable"  # transformers 6 drops the older name, 5.0 lacks the newer one
            enable = getattr(self.net, name) if hasattr(self.net, name) else self.net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.stage = about.get("stage", "dense")
        self.measured = about.get("measured", {})
        selector_training.set_router_options(self)
        self._make_meters()

    def enter_stage(self, stage: Stage) -> list[torch.Tensor]:
        """Moves to a stage: groups the neurons on leaving ``dense``, sets the mode and the trainable weights.

        Returns:
            The new order of each FFN's neurons, [F]; empty if they keep theirs.
        """
        self._distillation.enter(self, stage)
        groupings: list[Grouping] = []
        if self.stage == "dense" and stage != "dense":
            activations = selector_training.activations_to_group_by(self)
            groupings = group_experts(
                self.net, self.trainer.is_global_zero, activations, partial(selector_training.on_first_process, self)
            )
            if groupings:
                inertia, chance = sum(g.inertia for g in groupings), sum(g.random_inertia for g in groupings)
                self.measured["grouping"] = {"inertia": inertia, "random_inertia": chance}
                rank_zero_info(f"experts grouped: inertia {inertia:.1f}, {100 * inertia / chance:.1f} % of chance's")
            if self.router_start == "closed-form":
                selector_training.start_in_closed_form(self, stage)
        previous, self.stage = self.stage, stage
        if stage == "expert" and previous != "expert":
            selector_training.calibrate_and_measure(self)
        self.apply_stage()
        return [grouping.permutation_F for grouping in groupings]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # overloaded there
        """Names weights as in memory, the only names that torch knows of weights sharded over devices."""
        with own_names():
            return super().state_dict(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the stage and the measurements so far."""
        checkpoint["lte"] = {"stage": self.stage, "measured": self.measured, "config": asdict(lte_config(self.net))}
        checkpoint["lte"] |= self._distillation.saved() | self.control.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the stage, before optimizers are configured."""
        if "lte" not in checkpoint:
            raise UserError("this checkpoint was not written by lte-lightning: it names no stage")
        if self._trainer is not None and self.trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
            raise UserError(
                "this checkpoint holds weights only (best.ckpt does): resume from last.ckpt, or begin a new fit with "
                "--model.init_from and the run's model folder"
            )
        try:
            saved = LteConfig(**checkpoint["lte"]["config"])
        except TypeError as error:
            raise UserError(f"this checkpoint was written by another version of lte-lightning: {error}") from error
        if saved != lte_config(self.net):
            give_experts(self.net, saved)
            selector_training.set_router_options(self)
            self._make_meters()
        check_checkpoint(self, checkpoint["state_dict"])
        self.stage = checkpoint["lte"]["stage"]
        self.measured = checkpoint["lte"]["measured"]
        self._distillation.resume(self, checkpoint["lte"])
        self.control.resume(checkpoint["lte"])
        self.apply_stage()

    def configure_optimizers(self) -> Any:
        """Asks the stage schedule."""
        if self.schedule is None:
            raise UserError("training needs the StageSchedule callback: Trainer(callbacks=[StageSchedule(...)])")
        return self.schedule.configure_optimizers(self)

    # Training

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps pruned weights where they are."""
        if self.stage == "expert":
            hold_zeros(self.net)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Holds the target sparsity, once the optimizer has stepped."""
        if self.ends_step(batch_idx):
            self.control.shift_biases(self)

    def on_validation_start(self) -> None:
        """Brings the sparsity to the target before an epoch of the expert stage is measured."""
        super().on_validation_start()
        if self.trainer.state.fn == "fit":
            self.control.reach_target(self)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the stage's loss: the task's, with equation 6's two terms or a balance loss where routers learn.

        A baseline's predictors learn by themselves in the router stage. All are means over the rows or tokens of the
        whole optimizer step, in all of its batches and on all devices.
        """
        self.control.draw_sparsity(self)
        task_weight, token_weights = self.batch_weights(batch, batch_idx)
        if self.stage == "router" and imitates(self.net):
            loss = selector_training.imitate(self, batch, token_weights)
        elif not (self.routers_learn or self.control.applies(self)):
            loss = self._task_loss(batch, task_weight)
        else:
            with self.trace(batch) as trace:
                loss = self._task_loss(batch, task_weight)
            if self.routers_learn:
                loss = loss + self._router_loss(trace, token_weights)
            if self.control.applies(self):
                self.control.add_batch(self, trace)
        self.note("loss", loss)
        self.log_step(batch_idx)
        self._require_finite(loss, "training")
        return loss

    def _task_loss(self, batch: dict[str, torch.Tensor], weight: torch.Tensor | float) -> torch.Tensor:
        outputs = self.run_model(batch)
        loss = self.note("task_loss", outputs.loss * weight)
        divergence = self._distillation.divergence(self, batch, outputs)
        if divergence is None:
            return loss
        share = self._distillation.share
        return (1.0 - share) * loss + share * self.note("distillation_loss", divergence * weight)

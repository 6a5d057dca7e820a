"""The shared core of all tasks: an HF model with expert FFNs, its stages, losses and measurements."""

import math
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from lte_lightning.core.config import LteConfig
from lte_lightning.core.convert import expert_ffns, group_experts, selector_parameters, set_mode
from lte_lightning.core.cost import GFLOP, speedup_bound, token_cost
from lte_lightning.core.errors import UserError
from lte_lightning.core.losses import SEPARABILITY_EPSILON
from lte_lightning.core.sparse import set_backend
from lte_lightning.core.trace import RouterTrace
from lte_lightning.data.packaged import resolve
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.tasks.loading import give_experts, load
from lte_lightning.tasks.sparsity import SparsityMeter

Stage = Literal["dense", "router", "expert"]
LOWER_IS_BETTER = frozenset({"perplexity"})
STAGES: tuple[Stage, ...] = ("dense", "router", "expert")
# What a validation measures in each stage; only "hard" epochs compete for the best checkpoint.
VIEWS = {"dense": ("dense",), "router": ("soft", "hard_before"), "expert": ("hard",)}
VIEW_MODES = {"dense": "dense", "soft": "soft", "hard_before": "hard", "hard": "hard"}


class NonFiniteLossError(UserError):
    """The training loss became NaN or infinite."""


class LteModule(LightningModule):
    """A model in one of LTE's stages; a subclass adds the task.

    Args:
        task: Name of the task, for the results; the command line takes it from the data.
        pretrained: Model to start from: a folder, a hub id, or ``package://...`` (see the quickstart).
        init_from: Take the weights from here instead: a fine-tuned model with the same tokenizer (folder or hub id), or
            the ``model`` folder of an earlier run, which goes on in the stage it had reached.
        lte: Experts and routers. Default: the paper's choices, or those of an LTE model given by ``init_from``.
        efficiency_weight: eta, the weight of the efficiency loss: the sparsity dial (the paper uses 0 to 2).
        separability_weight: lambda, the weight that the separability loss ends with.
        separability_start: Share of the router stage after which lambda begins to grow from 0. With 0 here and in
            ``separability_end``, lambda is constant, as the paper's text reads.
        separability_end: Share of the router stage at which lambda is reached; it grows linearly in between.
        separability_epsilon: Keeps the separability loss finite (see ``core/losses.py``).
        layers: Keep only this many layers, the first ones, of a plain model (of encoder and decoder alike).
        gradient_checkpointing: Keep fewer activations for the backward pass, and compute them again: slower, in less
            memory.
        seed: Seed of the grouping and of the routers, unless ``lte`` has its own; the command line sets it to
            ``seed_everything``.
        backend: What computes the selected experts in ``test`` and ``predict``: ``auto``, ``dense-mask``,
            ``reference``, ``cpu`` or ``triton`` (see `set_backend`). Training and validation compute all and mask.
    """

    auto_class: ClassVar[Any]
    metric_name: str
    tests_dense: ClassVar[bool] = False  # whether a test of a model that was never routed makes sense
    loader_names: tuple[str, ...] = ("",)

    def __init__(
        self,
        task: str,
        pretrained: str,
        init_from: str | None = None,
        lte: LteConfig | None = None,
        efficiency_weight: float = 0.5,
        separability_weight: float = 0.5,
        separability_start: float = 0.5,
        separability_end: float = 1.0,
        separability_epsilon: float = SEPARABILITY_EPSILON,
        layers: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= separability_start <= separability_end <= 1.0:
            raise UserError(
                f"separability_start {separability_start} and separability_end {separability_end} are shares of the "
                "router stage: 0 <= start <= end <= 1"
            )
        weights = {"efficiency_weight": efficiency_weight, "separability_weight": separability_weight}
        for name, weight in (weights | {"separability_epsilon": separability_epsilon}).items():
            if not 0.0 <= weight < math.inf:
                raise UserError(f"{name} is {weight}; it must be a finite number, and not negative")
        self.save_hyperparameters(ignore=["lte", "backend"])  # a checkpoint's own would win over the command line's
        self.save_hyperparameters({"lte": asdict(lte) if lte else None})
        self.lte = replace(lte, seed=seed) if lte and lte.seed is None else lte
        self.backend = backend
        self.stage: Stage = "dense"
        self.stage_progress = 0.0
        self.measured: dict[str, dict[str, Any]] = {}
        self.predictions: list[dict[str, Any]] = []  # of a test that generates, one entry per example
        self.samples: list[dict[str, Any]] = []  # answers to read, until they are written
        self.net: PreTrainedModel | None = None
        self.schedule: Any = None

    # The task, by the subclass

    def model_arguments(self) -> dict[str, Any]:
        """What the task passes to ``from_pretrained``."""
        return {}

    def make_metric(self) -> Metric:
        """Returns a fresh metric, updated with what `outputs_for_metric` gives."""
        raise TypeError(f"{type(self).__name__} must define make_metric")

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns what the metric is updated with, predictions and targets for most."""
        raise TypeError(f"{type(self).__name__} must define outputs_for_metric")

    def run_model(self, batch: dict[str, torch.Tensor]) -> Any:
        """Returns the model's outputs, with their loss."""
        return self.net(**batch)

    def trace(self, batch: dict[str, torch.Tensor]) -> RouterTrace:
        """Returns a trace of the batch's real tokens."""
        return RouterTrace(self.net, batch["attention_mask"])

    def before_export(self) -> None:
        """Makes the trained model what is saved."""

    def test_figures(self) -> dict[str, Any]:
        """Returns what a test has found besides the metric."""
        return {}

    # Model and stages

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return resolve(self.hparams["init_from"] or self.hparams["pretrained"])

    def configure_model(self) -> None:
        """Loads the model and gives it experts; its weights are grouped only when the router stage begins."""
        if self.net is not None:
            return
        changes = {key: self.hparams[key] for key in ("layers", "from_scratch") if self.hparams.get(key) is not None}
        self.net, about = load(
            self.auto_class, self.source, self.model_arguments(), self.lte, self.hparams["seed"], **changes
        )
        if self.hparams["gradient_checkpointing"]:
            name = "activation_checkpointing_enable"  # transformers 6 drops the older name, 5.0 lacks the newer one
            enable = getattr(self.net, name) if hasattr(self.net, name) else self.net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.stage = about.get("stage", "dense")
        self.measured = about.get("measured", {})
        self._make_meters()

    def enter_stage(self, stage: Stage) -> None:
        """Moves to a stage: groups the neurons on leaving ``dense``, sets the mode and what is trainable."""
        if self.stage == "dense" and stage != "dense":
            groupings = group_experts(self.net, progress=self.trainer.is_global_zero)
            if groupings:
                inertia, chance = sum(g.inertia for g in groupings), sum(g.random_inertia for g in groupings)
                self.measured["grouping"] = {"inertia": inertia, "random_inertia": chance}
                rank_zero_info(f"experts grouped: inertia {inertia:.1f}, {100 * inertia / chance:.1f} % of chance's")
        self.stage = stage
        self.apply_stage()

    def apply_stage(self) -> None:
        """Sets the FFNs' mode and the routers' trainability as the current stage wants them."""
        set_mode(self.net, {"dense": "dense", "router": "soft", "expert": "hard"}[self.stage])
        for parameter in selector_parameters(self.net):
            parameter.requires_grad_(self.stage == "router")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the stage and what was measured so far."""
        checkpoint["lte"] = {"stage": self.stage, "measured": self.measured, "config": asdict(self.net.lte_config)}

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
        if saved != self.net.lte_config:
            give_experts(self.net, saved)
            self._make_meters()
        self.stage = checkpoint["lte"]["stage"]
        self.measured = checkpoint["lte"]["measured"]
        self.apply_stage()

    def configure_optimizers(self) -> Any:
        """Asks the stage schedule."""
        if self.schedule is None:
            raise UserError("training needs the StageSchedule callback: Trainer(callbacks=[StageSchedule(...)])")
        return self.schedule.configure_optimizers(self)

    # Training

    def separability_weight_now(self) -> float:
        """Returns lambda at this point of the router stage."""
        start, end = self.hparams["separability_start"], self.hparams["separability_end"]
        if self.stage_progress >= end:
            return self.hparams["separability_weight"]
        if self.stage_progress <= start:
            return 0.0
        return self.hparams["separability_weight"] * (self.stage_progress - start) / (end - start)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the stage's loss: the task's, in the router stage with equation 6's two terms."""
        if self.stage != "router":
            loss = self.run_model(batch).loss
            self.log("train/task_loss", loss)
        else:
            with self.trace(batch) as trace:
                task_loss = self.run_model(batch).loss
            efficiency = trace.efficiency_loss()
            weight = self.separability_weight_now()
            separability = trace.separability_loss(self.hparams["separability_epsilon"])
            loss = task_loss + self.hparams["efficiency_weight"] * efficiency + weight * separability
            self.log_dict(
                {
                    "train/task_loss": task_loss,
                    "train/efficiency_loss": efficiency,
                    "train/separability_loss": separability,
                    "train/separability_weight": weight,
                }
            )
        self.log("train/loss", loss, prog_bar=True)
        self._require_finite(loss, "training")
        return loss

    def _require_finite(self, loss: torch.Tensor, what: str) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the {what} loss is {loss.item()} in stage {self.stage!r} at step {self.global_step}; the weights "
                "of the epoch before are kept in the last checkpoint. Lower the learning rate, or use "
                "trainer.precision 32-true"
            )

    # Evaluation

    def _make_meters(self) -> None:
        names = [f"{view}{suffix}" for view in VIEW_MODES for suffix in self.loader_names]
        self.meters = nn.ModuleDict({name: self.make_metric() for name in names})
        self.sparsity = SparsityMeter([ffn.experts for ffn in expert_ffns(self.net).values()])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures every view of the current stage."""
        for view in VIEWS[self.stage]:
            self._measure(view, batch, dataloader_idx)
        self.apply_stage()

    def _measure(self, view: str, batch: dict[str, torch.Tensor], dataloader_idx: int) -> None:
        set_mode(self.net, VIEW_MODES[view])
        if VIEW_MODES[view] == "hard":
            with self.trace(batch) as trace:
                outputs = self.run_model(batch)
            self.sparsity.update(trace)
        else:
            outputs = self.run_model(batch)
        self._require_finite(outputs.loss, "validation")  # before a checkpoint of such weights is written
        self.meters[f"{view}{self.loader_names[dataloader_idx]}"].update(*self.outputs_for_metric(outputs, batch))

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/<view>/<metric>`` and the sparsity, and remembers them for the results."""
        for view in VIEWS[self.stage]:
            found = self._read_meters(view)
            # a sanity check of a few rows is no measurement
            if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == math.inf:
                self.measured[view] = {key: _json(value) for key, value in found.items()}
            scalars = {key: value for key, value in found.items() if isinstance(value, float)}
            self.log_dict({f"val/{view}/{key}": value for key, value in scalars.items()})

    def _read_meters(self, view: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for suffix in self.loader_names:
            meter = self.meters[f"{view}{suffix}"]
            if not meter.update_called:  # MNLI's second set, if the first is held out of the training rows
                continue
            value = meter.compute()
            figures = value if isinstance(value, dict) else {self.metric_name: value}
            for name, figure in figures.items():
                found[f"{name}{suffix}"] = figure if isinstance(figure, dict) else float(figure)
            meter.reset()
        if VIEW_MODES[view] == "hard":
            found |= self.sparsity.compute()
            self.sparsity.reset()
        return found

    @property
    def test_view(self) -> str:
        """The view that a test measures: hard, or dense where the model was never routed."""
        return "dense" if self.stage == "dense" else "hard"

    def on_test_start(self) -> None:
        """Refuses a model without trained selection, unless it can be tested so; skips experts from here on."""
        if self.stage == "dense" and not self.tests_dense:
            raise UserError(
                "this model was never routed, so there is no sparsity to test: train the router and expert stages "
                "first, or give a routed model by --ckpt_path or --model.init_from"
            )
        set_backend(self.net, self.backend)

    def on_test_end(self) -> None:
        """Leaves the backend to training again."""
        set_backend(self.net, "dense-mask")

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures the model in hard mode, or densely if it was never routed."""
        self._measure(self.test_view, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the metric, the sparsity overall and per layer, and what a token costs."""
        found = self._read_meters(self.test_view) | self.test_figures()
        dense = self.test_view == "dense"
        per_layer = [0.0] * len(self.sparsity.experts) if dense else found["sparsity_per_layer"]
        cost = self.cost(None if dense else per_layer)
        if dense:
            found |= {"sparsity": 0.0, "sparsity_per_layer": per_layer}
        self.measured["test"] = {key: _json(value) for key, value in found.items()} | cost
        self.log_dict({f"test/{key}": value for key, value in found.items() if isinstance(value, float)})
        self.log("test/gflops_per_token", cost["flops_per_token"] / GFLOP)
        self.log("test/megabytes_per_token", cost["bytes_per_token"] / 1e6)
        self.log("test/bound", cost["bound"])
        self.log_dict({f"test/sparsity_layer_{i:02d}": sparsity for i, sparsity in enumerate(per_layer)})

    def cost(self, sparsity_per_layer: list[float] | None) -> dict[str, float]:
        """Returns FLOPs per token as the paper counts them, and bytes moved in bfloat16, sparse and dense.

        ``bound`` is the speed-up that the bytes allow at most. Without sparsities both are those of the dense model.
        """
        dense = token_cost(self.net)
        sparse = dense if sparsity_per_layer is None else token_cost(self.net, sparsity_per_layer)
        return {
            "flops_per_token": sparse.paper_flops,
            "dense_flops_per_token": dense.paper_flops,
            "bytes_per_token": sparse.bytes,
            "dense_bytes_per_token": dense.bytes,
            "bound": speedup_bound(dense.bytes, sparse.bytes),
        }

    def on_predict_start(self) -> None:
        """Predicts in hard mode, or densely if the model was never routed."""
        if self.trainer.world_size > 1:
            raise UserError("predictions are written in the order of the data by one process: set trainer.devices to 1")
        set_mode(self.net, self.test_view)
        set_backend(self.net, self.backend)

    def on_predict_end(self) -> None:
        """Leaves the backend to training again."""
        set_backend(self.net, "dense-mask")


def _json(value: Any) -> Any:
    # JSON has no NaN, which a correlation of constant predictions is
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Measurement of every task: the views of each stage, sparsity, cost per token."""

import math
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from lte_lightning.core.accounting.cost import GFLOP, cost_beside_dense
from lte_lightning.core.accounting.skeleton import skeleton, without_values
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import Mode, expert_ffns, set_mode
from lte_lightning.core.model.quantize import Quantization, quantize
from lte_lightning.core.model.quantized import is_quantized
from lte_lightning.core.model.thresholds import set_sparsity
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.results import json_value
from lte_lightning.tasks.bootstrap import RowDraws
from lte_lightning.tasks.sparsity_meter import SparsityMeter

Stage = Literal["dense", "router", "expert"]
STAGES: tuple[Stage, ...] = ("dense", "router", "expert")
# What a validation measures in each stage; only "hard" epochs compete for the best checkpoint.
VIEWS: dict[Stage, tuple[str, ...]] = {"dense": ("dense",), "router": ("soft", "hard_before"), "expert": ("hard",)}
STAGE_MODES: dict[Stage, Mode] = {"dense": "dense", "router": "soft", "expert": "hard"}
VIEW_MODES: dict[str, Mode] = {"dense": "dense", "soft": "soft", "hard_before": "hard", "hard": "hard"}


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite."""


class MeasuredModule(LightningModule):
    """A model with expert FFNs that is validated, tested and used for predictions; `LteModule` trains it.

    Attributes:
        net: The model.
        stage: Where its training stands.
        stage_progress: Share of the current stage that is done.
        measured: Values so far, by view.
        freeze_routers: Whether the expert stage leaves the routers as they are.
        router_training: Whether the router stage runs all experts, weighted (``soft``), or the selected ones alone.
        router_start: How the routers start, ``random`` or in ``closed-form``.
        detach_router: Whether routers send no gradient to what they read.
        set_to: The sparsity that a calibrated model is measured at; None for its own.
    """

    tests_dense: ClassVar[bool] = False  # whether a test of a model that was never routed makes sense
    net: PreTrainedModel
    meters: nn.ModuleDict
    sparsity: SparsityMeter
    draws: RowDraws
    stage: Stage
    measured: dict[str, dict[str, Any]]
    backend: Backend
    quantize: Quantization | None = None
    _counted: tuple[PreTrainedModel, ...] = ()  # what costs are counted of, where that is another model
    skip_experts: bool
    freeze_routers: bool = True
    stage_progress: float
    router_training: str = "soft"
    router_start: str = "random"
    detach_router: bool = False
    set_to: float | None = None

    # The task, by the subclass

    @property
    def metric_name(self) -> str:
        """The reported metric."""
        raise TypeError(f"{type(self).__name__} must define metric_name")

    @property
    def loader_names(self) -> tuple[str, ...]:
        """Suffixes of several validation sets."""
        return ("",)

    @property
    def source(self) -> str:
        """Folder or hub id of the weights."""
        raise TypeError(f"{type(self).__name__} must define source")

    @property
    def is_loaded(self) -> bool:
        """Whether the model is loaded."""
        return "net" in self._modules

    def make_metric(self) -> Metric:
        """Returns a fresh metric, which `outputs_for_metric` updates."""
        raise TypeError(f"{type(self).__name__} must define make_metric")

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the arguments of the metric's update, mostly predictions and targets."""
        raise TypeError(f"{type(self).__name__} must define outputs_for_metric")

    def by_rows(self, found: Any, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the values of `outputs_for_metric` per row, each tensor [B]."""
        return cast(tuple[torch.Tensor, ...], found)

    def run_model(self, batch: dict[str, torch.Tensor], net: Any = None) -> Any:
        """Returns the outputs of the model, or of another one, with their loss."""
        return (self.net if net is None else net)(**batch)

    def kept_logits(self, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits that the loss is the mean over, [N, C]."""
        return outputs.logits

    def trace(self, batch: dict[str, torch.Tensor]) -> RouterTrace:
        """Returns a trace of the batch's real tokens."""
        return RouterTrace(self.net, *self.token_masks(batch))

    def token_masks(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns which tokens are real; of an encoder-decoder in the encoder and in the decoder."""
        return (batch["attention_mask"],)

    def test_figures(self) -> dict[str, Any]:
        """Returns a test's further values beside the metric."""
        return {}

    # Measuring

    @property
    def views(self) -> tuple[str, ...]:
        """The views that a validation measures in the current stage."""
        return VIEWS[self.stage] if self.stage_mode != "hard" or self.stage == "expert" else ("hard_before",)

    @property
    def stage_mode(self) -> Mode:
        """The FFNs' mode in the current stage."""
        if self.stage == "router" and self.router_training == "straight-through":
            return "hard"
        return STAGE_MODES[self.stage]

    def apply_stage(self) -> None:
        """Sets the FFNs' mode and the routers' trainability as the current stage wants them."""
        set_mode(self.net, self.stage_mode)
        for parameter in selector_parameters(self.net):
            parameter.requires_grad_(self.routers_learn)
        for ffn in expert_ffns(self.net).values():
            ffn.straight_through = self.stage_mode == "hard" and self.routers_learn
            ffn.skips_in_training = self.skip_experts and self.stage == "expert" and not self.routers_learn
            ffn.detach_router = self.detach_router

    def _measure_from_here(self) -> None:
        """Prepares the model for measuring: sparsity, rounding and backend as asked, no skipping."""
        self.turn_knob()
        self._quantize()
        set_backend(self.net, self.backend)
        for ffn in expert_ffns(self.net).values():
            ffn.skips_in_training = False

    def _train_from_here(self) -> None:
        """Restores the backend of training."""
        set_backend(self.net, "dense-mask")
        self.apply_stage()

    @property
    def routers_learn(self) -> bool:
        """Whether the routers are trained in the current stage."""
        return self.stage == "router" or (self.stage == "expert" and not self.freeze_routers)

    def _require_finite(self, loss: torch.Tensor, what: str) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the {what} loss is {loss.item()} in stage {self.stage!r} at step {self.global_step}; last.ckpt "
                "holds the weights of the epoch before. Lower the learning rate, or use "
                "trainer.precision 32-true"
            )

    def _make_meters(self) -> None:
        names = [f"{view}{suffix}" for view in VIEW_MODES for suffix in self.loader_names]
        self.meters = nn.ModuleDict({name: self.make_metric() for name in names})
        self.draws = RowDraws(self.make_metric(), self.metric_name)
        self.sparsity = SparsityMeter([ffn.experts for ffn in expert_ffns(self.net).values()])

    def turn_knob(self) -> None:
        """Sets the sparsity of a calibrated model that is measured elsewhere than where its knob stood."""
        if self.set_to is not None:
            set_sparsity(self.net, self.set_to)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures every view of the current stage."""
        for view in self.views:
            self.measure(view, batch, dataloader_idx)
        self.apply_stage()

    def measure(self, view: str, batch: dict[str, torch.Tensor], dataloader_idx: int) -> None:
        """Runs a batch in a view's mode and adds it to the view's meters."""
        set_mode(self.net, VIEW_MODES[view])
        if VIEW_MODES[view] == "hard":
            with self.trace(batch) as trace:
                outputs = self.run_model(batch)
            self.sparsity.update(trace)
        else:
            outputs = self.run_model(batch)
        self._require_finite(outputs.loss, "validation")  # before a checkpoint of such weights is written
        found = self.outputs_for_metric(outputs, batch)
        cast(Metric, self.meters[f"{view}{self.loader_names[dataloader_idx]}"]).update(*found)
        if view == "hard" and dataloader_idx == 0:
            self.draws.update(*self.by_rows(found, outputs, batch))

    def run_again(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> None:
        """Runs a batch as a validation or a test does, and measures nothing."""
        self.run_model(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/<view>/<metric>`` and the sparsity, and remembers them for the results."""
        for view in self.views:
            values = self.read_meters(view)
            # a sanity check of a few rows is no measurement
            if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == math.inf:
                self.measured[view] = {key: json_value(value) for key, value in values.items()}
            scalars = {f"val/{view}/{key}": value for key, value in values.items() if isinstance(value, float)}
            self.log_dict(scalars, sync_dist=True)

    def read_meters(self, view: str) -> dict[str, Any]:
        """Returns the values of a view's meters, and resets them."""
        values: dict[str, Any] = {}
        for suffix in self.loader_names:
            meter = cast(Metric, self.meters[f"{view}{suffix}"])
            if not meter.update_called:  # MNLI's second set, if the first is held out of the training rows
                continue
            value = meter.compute()
            parts = value if isinstance(value, dict) else {self.metric_name: value}
            for name, part in parts.items():
                values[f"{name}{suffix}"] = part if isinstance(part, dict) else float(part)
            meter.reset()
        if VIEW_MODES[view] == "hard":
            values |= self.sparsity.compute() | (self.draws.compute() if view == "hard" else {})
            self.sparsity.reset()
        return values

    @property
    def test_view(self) -> Literal["dense", "hard"]:
        """The view that a test measures, which names its mode: hard, or dense where the model was never routed."""
        return "dense" if self.stage == "dense" else "hard"

    def on_test_start(self) -> None:
        """Refuses a model without trained selection, unless it can be tested so; skips experts from here on."""
        if self.stage == "dense" and not self.tests_dense:
            raise UserError(
                "this model was never trained with routers, so there is no sparsity to test: train the router and "
                "expert stages first, or name a model that was with --ckpt_path or --model.init_from"
            )
        self._measure_from_here()

    def _quantize(self) -> None:
        """Rounds the weights if asked; the cost of a token is that of the model before rounding."""
        if is_quantized(self.net):
            self._counted = (skeleton(self.source),)
        elif self.quantize:
            self._counted = (without_values(self.net),)  # in a tuple, for it is no part of this module
            quantize(self.net.eval(), self.quantize)

    def on_test_end(self) -> None:
        """Restores the backend of training."""
        self._train_from_here()

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures the model in hard mode, or densely if it was never routed."""
        self.measure(self.test_view, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the metric, the sparsity overall and per layer, and the cost of a token."""
        values = self.read_meters(self.test_view) | self.test_figures()
        dense = self.test_view == "dense"
        per_layer = [0.0] * len(self.sparsity.experts) if dense else values["sparsity_per_layer"]
        cost = self.cost(None if dense else per_layer)
        if dense:
            values |= {"sparsity": 0.0, "sparsity_per_layer": per_layer}
        self.measured["test"] = {key: json_value(value) for key, value in values.items()} | cost
        scalars = {key: value for key, value in values.items() if isinstance(value, float)}
        scalars["gflops_per_token"] = cost["flops_per_token"] / GFLOP
        scalars |= {"megabytes_per_token": cost["bytes_per_token"] / 1e6, "bound": cost["bound"]}
        scalars |= {f"union_sparsity_{size}": share for size, share in values.get("union_sparsity", {}).items()}
        scalars |= {f"sparsity_layer_{i:02d}": sparsity for i, sparsity in enumerate(per_layer)}
        # meters hold what all devices saw; without sync_dist Lightning warns as if each logged its own
        self.log_dict({f"test/{key}": value for key, value in scalars.items()}, sync_dist=True)

    def cost(self, sparsity_per_layer: list[float] | None) -> dict[str, float]:
        """Returns the cost of a token, as of `cost_beside_dense`; of quantised weights before rounding."""
        return cost_beside_dense(self._counted[0] if self._counted else self.net, sparsity_per_layer)

    def on_predict_start(self) -> None:
        """Predicts in hard mode, or densely if the model was never routed."""
        if self.trainer.world_size > 1:
            raise UserError("predictions are written in the order of the data by one process: set trainer.devices to 1")
        set_mode(self.net, self.test_view)
        self._measure_from_here()

    on_predict_end = on_test_end

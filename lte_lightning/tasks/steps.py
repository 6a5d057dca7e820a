"""Losses that are means over a whole optimizer step: over all of its batches, on all devices."""

from typing import Any

import torch

from lte_lightning.core.model.quantized import is_quantized
from lte_lightning.core.model.thresholds import set_sparsity
from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import MeasuredModule


class StepLosses(MeasuredModule):
    """A module whose losses are weighted, and logged, by optimizer step; `LteModule` trains it.

    Attributes:
        step_amounts: What the current optimizer step holds, over all devices, as of `amounts`.
        step_losses: Its losses so far, by name.
    """

    step_amounts: torch.Tensor
    step_losses: dict[str, torch.Tensor]

    def on_fit_start(self) -> None:
        """Resets a calibrated model to the threshold that its routers were trained at.

        Raises:
            UserError: If a sparsity to measure at is given, or the model is quantised or is to be.
        """
        if self.quantize or is_quantized(self.net):
            raise UserError(
                "a quantised model cannot be trained: train the folder that it was made from, and use model.quantize "
                "only with lightning test and predict"
            )
        if self.set_to is not None:
            raise UserError(
                f"model.sparsity {self.set_to} applies to validate, test and predict; for a fit, set "
                "model.lte.target_sparsity"
            )
        set_sparsity(self.net, None)

    def on_validation_start(self) -> None:
        """Sets the sparsity of a calibrated model in ``validate``; a fit validates at its own."""
        if self.trainer.state.fn == "validate":
            self.turn_knob()

    def task_amount(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the count that a batch's task loss is the mean over: rows, or tokens in a subclass."""
        return batch["labels"].new_tensor(len(batch["labels"]), dtype=torch.long)

    def ends_step(self, batch_idx: int) -> bool:
        """Says whether a batch is the last one of its optimizer step."""
        done = batch_idx + 1
        return done % self.trainer.accumulate_grad_batches == 0 or done == self.trainer.num_training_batches

    def amounts(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the counts [1 + stacks] that a batch's losses are means over: of the task, and of the routers."""
        tokens = [mask.bool().sum() for mask in self.token_masks(batch)]
        return torch.stack([self.task_amount(batch), *tokens])

    def batch_weights(
        self, batch: dict[str, torch.Tensor], batch_idx: int
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        """Returns the factors of a batch's task loss, and of its routers' losses by stack."""
        accumulate, devices = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if accumulate == 1 and devices == 1:
            return 1.0, None
        batch_amounts = self.amounts(batch)
        if batch_idx % accumulate == 0:
            step_amounts = batch_amounts.clone()  # it is reduced in place
            if accumulate > 1:
                loader: Any = self.trainer.train_dataloader  # a StepLoader
                step_amounts = loader.take(batch_idx // accumulate).to(batch_amounts.device)
            self.step_amounts = self.trainer.strategy.reduce(step_amounts, reduce_op="sum")
        # The step's loss is the sum of loss * batch_amount / step_amount over its batches on all devices. Lightning
        # divides each by the number of batches, and DDP by that of devices: the factor takes both back.
        weights = batch_amounts * (accumulate * devices) / self.step_amounts
        return weights[0], weights[1:]

    def note(self, name: str, loss: torch.Tensor) -> torch.Tensor:
        """Keeps a loss to be logged at the end of the optimizer step, and returns it."""
        mean = loss.detach() / self.trainer.accumulate_grad_batches
        self.step_losses[name] = mean + self.step_losses.pop(name, 0.0)
        return loss

    def log_step(self, batch_idx: int) -> None:
        """Logs a step's losses at its last batch."""
        if self.ends_step(batch_idx):
            for name, loss in self.step_losses.items():
                self.log(f"train/{name}", loss, prog_bar=name == "loss")
            self.step_losses = {}

"""GLUE: sentence and sentence-pair classification, and regression for STS-B."""

from typing import Any

import torch
from torchmetrics import MatthewsCorrCoef, Metric, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification

from lte_lightning.data.glue import glue_task
from lte_lightning.tasks.base import LteModule


class Classification(LteModule):
    """Fine-tunes an encoder on a GLUE task and makes it sparse.

    Args:
        task: Name of the GLUE task; the command line takes it from the data.
        **kwargs: See `LteModule`.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(self, task: str, **kwargs: Any) -> None:
        super().__init__(task=task, **kwargs)
        self.glue = glue_task(task)
        self.metric_name = self.glue.metric
        if len(self.glue.validation_splits) > 1:
            self.loader_names = ("", "_mismatched")

    def model_arguments(self) -> dict[str, Any]:
        """A head with one output per label, or one for regression."""
        return {"num_labels": self.glue.labels}

    def make_metric(self) -> Metric:
        """Returns the task's official metric."""
        if self.glue.metric == "pearson":
            return PearsonCorrCoef()
        if self.glue.metric == "matthews":
            return MatthewsCorrCoef(task="multiclass", num_classes=self.glue.labels)
        return MulticlassAccuracy(self.glue.labels, average="micro")

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns classes, or values for regression, and labels."""
        return self._answers(outputs), batch["labels"]

    def _answers(self, outputs: Any) -> torch.Tensor:
        logits = outputs.logits.float()
        return logits.squeeze(-1) if self.glue.labels == 1 else logits.argmax(-1)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns the predicted classes or values, [B]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return self._answers(self.net(**inputs))

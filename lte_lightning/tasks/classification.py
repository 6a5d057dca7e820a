"""Classification of sentences and pairs of sentences, and regression."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric
from transformers import AutoModelForSequenceClassification

from lte_lightning.data.classification import ClassificationData
from lte_lightning.data.glue import GLUE_TASKS, glue_task
from lte_lightning.data.labels import Labels, classes_of, listed, model_config
from lte_lightning.errors import UserError
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.metrics import make_metric, require_metric
from lte_lightning.trainer import declared


class Classification(LteModule):
    """Fine-tunes an encoder to tell classes apart, or to predict a number, and makes it sparse.

    Classes, their names and what is reported come from the data; without a data module the task is one of GLUE's.

    Args:
        metric: The reported metric, by which the best checkpoint is chosen: accuracy, f1, precision, recall (each with
            _macro, _weighted or _micro), matthews or kappa; pearson, spearman, r2, mae or mse of numbers. By default
            what the data say: GLUE's official one, accuracy, or pearson.
        **kwargs: See `LteModule`.
    """

    auto_class = AutoModelForSequenceClassification
    rows: LightningDataModule | None = None  # whose classes count where there is no trainer to ask

    def __init__(self, metric: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters({"metric": metric and require_metric(metric)})

    # What the data say

    @property
    def _data(self) -> ClassificationData | None:
        data = declared(self._trainer).datamodule if self._trainer else self.rows
        return data if isinstance(data, ClassificationData) else None

    @property
    def labels(self) -> Labels | None:
        """The classes in the order of the model's outputs; None for regression."""
        if self._data:
            return self._data.labels
        names = glue_task(self.hparams["task"]).classes
        return Labels(tuple(range(len(names))), names) if names else None

    @property
    def metric_name(self) -> str:
        """The reported metric."""
        return self.hparams["metric"] or (self._data or glue_task(self.hparams["task"])).metric

    @property
    def loader_names(self) -> tuple[str, ...]:
        """Suffixes of several validation sets: MNLI has two."""
        splits = (self._data or GLUE_TASKS[self.hparams["task"]]).validation_splits
        return ("", *(f"_{name.removeprefix('validation_')}" for name in splits[1:]))

    def configure_model(self) -> None:
        """Loads the model, after comparing its classes with those of the data."""
        if not self.is_loaded:
            require_metric(self.metric_name, regression=self.labels is None)
            self._compare_classes()
        super().configure_model()

    def _compare_classes(self) -> None:
        trained = classes_of(model_config(self.source))
        if trained is None:
            return
        count, names = trained
        wanted = list(self.labels.names) if self.labels else []
        outputs = len(wanted) or 1
        if count != outputs:
            theirs = f"{count} classes" + (f" ({listed(names)})" if names else "") if count > 1 else "a number"
            ours = f"{outputs} classes ({listed(wanted)})" if wanted else "numbers"
            raise UserError(
                f"{self.source} was fine-tuned for {theirs}, the data have {ours}: start from a model without such a "
                "head, or give data whose labels it knows"
            )
        if names and wanted and [n.casefold() for n in names] != [n.casefold() for n in wanted]:
            message = f"{self.source} was fine-tuned for the classes {listed(names)}, the data have {listed(wanted)}"
            if not self._trainer or self.trainer.state.fn != "fit":
                raise UserError(f"{message}; data.classes gives the labels in the order of the model's")
            rank_zero_warn(f"{message}, in this order; its head learns them anew")

    def model_arguments(self) -> dict[str, Any]:
        """A head with one output per class and the classes' names, or one output for regression."""
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.labels.names))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the classes, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lte"]["classes"] = list(self.labels.names) if self.labels else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the stage, after comparing the checkpoint's classes with those of the data."""
        names, wanted = checkpoint.get("lte", {}).get("classes"), list(self.labels.names) if self.labels else None
        if names and names != wanted:
            raise UserError(
                f"this checkpoint was trained for {len(names)} classes ({listed(names)}), the data have "
                f"{len(wanted or [])} ({listed(wanted or [])}): give the run's model folder by --model.init_from, "
                "which brings its classes, instead of --ckpt_path"
            )
        super().on_load_checkpoint(checkpoint)

    # Figures and answers

    def make_metric(self) -> Metric:
        """Returns the metric, of classes with their confusion matrix."""
        return make_metric(self.metric_name, self.labels.names if self.labels else None)

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns classes, or values for regression, and labels."""
        logits = outputs.logits.float()
        return logits.squeeze(-1) if self.labels is None else logits.argmax(-1), batch["labels"]

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns a row for each text: the class in the data's terms with its name and probability, or the value."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self.net(**inputs).logits.float()
        if self.labels is None:
            return [{"prediction": value} for value in logits.squeeze(-1).tolist()]
        probability_B, class_B = logits.softmax(-1).max(-1)
        rows = []
        for number, probability in zip(class_B.tolist(), probability_B.tolist(), strict=True):
            value, name = self.labels.values[number], self.labels.names[number]
            row = {"prediction": value} if str(value) == name else {"prediction": value, "name": name}
            rows.append(row | {"probability": round(probability, 4)})
        return rows

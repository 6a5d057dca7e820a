"""The metrics of classification and regression, by name, and which class was taken for which."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, PearsonCorrCoef, R2Score, SpearmanCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MulticlassPrecision,
    MulticlassRecall,
)

from lte_lightning.errors import UserError, meant

_AVERAGED = {
    "accuracy": MulticlassAccuracy,
    "f1": MulticlassF1Score,
    "precision": MulticlassPrecision,
    "recall": MulticlassRecall,
}
_AVERAGES = ("macro", "weighted", "micro")
_OF_CLASSES = {"matthews": MulticlassMatthewsCorrCoef, "kappa": MulticlassCohenKappa}
_OF_NUMBERS = {
    "pearson": PearsonCorrCoef,
    "spearman": SpearmanCorrCoef,
    "r2": R2Score,
    "mae": MeanAbsoluteError,
    "mse": MeanSquaredError,
}
# What a name without an average stands for
_PLAIN = {"accuracy": "micro", "f1": "macro", "precision": "macro", "recall": "macro"}
CLASS_METRICS = (*_AVERAGED, *(f"{name}_{average}" for name in _AVERAGED for average in _AVERAGES), *_OF_CLASSES)
NUMBER_METRICS = tuple(_OF_NUMBERS)


def require_metric(name: str, regression: bool | None = None) -> str:
    """Returns the name of a metric, after checking that there is one.

    Args:
        name: Of the metric.
        regression: Whether numbers are predicted; None if that is not known yet.

    Raises:
        UserError: There is no such metric, or it is one of the other kind.
    """
    known = {None: (*CLASS_METRICS, *NUMBER_METRICS), True: NUMBER_METRICS, False: CLASS_METRICS}[regression]
    if name not in known:
        kind = {None: "", True: "regression ", False: "classification "}[regression]
        raise UserError(f"unknown {kind}metric {name!r}{meant(name, known)}; there are {', '.join(known)}")
    return name


class ClassMetric(Metric):
    """One metric of classes, and the confusion matrix.

    Args:
        name: One of `CLASS_METRICS`; without an average accuracy is over all rows, and the others are macro averages.
        classes: Names of the classes.
    """

    full_state_update = False

    def __init__(self, name: str, classes: Sequence[str]) -> None:
        super().__init__()
        self.name, self.classes = require_metric(name, regression=False), list(classes)
        kind, _, average = name.partition("_")
        averaging = {"average": average or _PLAIN[kind]} if kind in _AVERAGED else {}
        self.metric = {**_AVERAGED, **_OF_CLASSES}[kind](num_classes=len(classes), **averaging)
        self.confusion = MulticlassConfusionMatrix(len(classes))

    def update(self, predicted_B: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Adds a batch of classes, as numbers."""
        self.metric.update(predicted_B, labels_B)
        self.confusion.update(predicted_B, labels_B)

    def compute(self) -> dict[str, Any]:
        """Returns the metric by its name, and ``confusion_matrix``: how often each class was taken for which."""
        counts = self.confusion.compute().tolist()
        matrix = {
            name: {other: count for other, count in zip(self.classes, row, strict=True) if count}
            for name, row in zip(self.classes, counts, strict=True)
            if any(row)
        }
        return {self.name: self.metric.compute(), "confusion_matrix": matrix}

    def reset(self) -> None:
        """Forgets all batches."""
        super().reset()
        self.metric.reset()
        self.confusion.reset()


def make_metric(name: str, classes: Sequence[str] | None) -> Metric:
    """Returns a fresh metric.

    Args:
        name: One of `CLASS_METRICS`, or of `NUMBER_METRICS` if there are no classes.
        classes: Their names; None if numbers are predicted.
    """
    if classes is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Spearman")  # it keeps all numbers, one for each row
            return _OF_NUMBERS[require_metric(name, regression=True)]()
    return ClassMetric(name, classes)

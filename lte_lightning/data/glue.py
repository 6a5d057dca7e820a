"""The GLUE tasks as a data module, from the hub or from a folder."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from lte_lightning.data.classification import ClassificationData
from lte_lightning.data.labels import Labels
from lte_lightning.data.packaged import DataError
from lte_lightning.errors import meant


@dataclass(frozen=True)
class GlueTask:
    """Columns, classes, metric and splits of a GLUE task.

    Args:
        text_columns: One sentence, or two that are read as a pair.
        classes: Their names in the order of their numbers; none where the label is a number.
        metric: The reported metric.
        validation_splits: Names of the labelled splits that are not for training.
    """

    text_columns: tuple[str, ...]
    classes: tuple[str, ...]
    metric: Literal["accuracy", "matthews", "pearson"] = "accuracy"
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def labels(self) -> int:
        """Number of the model's outputs: one for each class, or one for a number."""
        return len(self.classes) or 1

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the splits for predictions, without labels at the source."""
        return tuple(name.replace("validation", "test") for name in self.validation_splits)


_PAIR = ("sentence1", "sentence2")
_MNLI = ("validation_matched", "validation_mismatched")
GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": GlueTask(_PAIR, (), "pearson"),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validation_splits=_MNLI),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment")),
}


def glue_task(name: str) -> GlueTask:
    """Look up a task by name.

    Raises:
        DataError: If there is no such task.
    """
    if name not in GLUE_TASKS:
        raise DataError(f"unknown GLUE task {name!r}{meant(name, GLUE_TASKS)}; known are {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[name]


class GlueData(ClassificationData):
    """One GLUE task, tokenised once, in batches of similar length.

    Args:
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli or rte.
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: Folder with the task's files (train.jsonl, validation.jsonl, ...; also json, csv, tsv, parquet), or id
            of a data set on the hub.
        max_length: Tokens per row at most, special tokens included; longer rows are cut.
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per validation, test and prediction batch and device.
        holdout: Share of the training rows, up to 0.5, that becomes the validation set. The official validation rows
            are then the test set, and no checkpoint is chosen by looking at them. With 0, the official validation rows
            serve as validation and test set, unless the source has a labelled test split.
        **kwargs: See `TextData`.

    Attributes:
        glue: The task's columns, classes and metric.
    """

    hint = ""
    stratifies = False  # a seed keeps its rows

    def __init__(
        self,
        task: str,
        tokenizer: str,
        source: str = "nyu-mll/glue",
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        holdout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.glue = glue_task(task)
        super().__init__(
            tokenizer=tokenizer,
            source=source,
            text=list(self.glue.text_columns),
            label="label",
            classes=None,
            regression=not self.glue.classes,
            task=task,
            subset=task,
            revision=None,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            holdout=holdout,
            **kwargs,
        )
        self.validation_splits, self.test_splits = self.glue.validation_splits, self.glue.test_splits
        self.metric = self.glue.metric

    @functools.cached_property
    def classes(self) -> Labels | None:
        """The task's own."""
        return Labels(tuple(range(self.glue.labels)), self.glue.classes) if self.glue.classes else None

    def expected(self) -> str:
        """Returns a description of a right label, for messages."""
        return f"one of 0 to {self.glue.labels - 1}" if self.classes else super().expected()

    def has_targets(self, rows: Dataset) -> bool:
        """Says whether a split is labelled: the hub's test splits of GLUE are not."""
        return "label" in rows.column_names and not set(rows["label"][:]) <= {-1, None}

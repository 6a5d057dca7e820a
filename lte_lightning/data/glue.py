"""The GLUE tasks as a data module, from the hub or from a folder."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset

from lte_lightning.data.base import TextData, require_text
from lte_lightning.data.files import meant
from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import Collate, tokenize


@dataclass(frozen=True)
class GlueTask:
    """What a GLUE task looks like.

    Args:
        text_columns: One sentence, or two that are read as a pair.
        labels: Number of classes; 1 means that the label is a number.
        metric: What is reported.
        validation_splits: Names of the labelled splits that are not for training.
    """

    text_columns: tuple[str, ...]
    labels: int
    metric: Literal["accuracy", "matthews", "pearson"]
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the splits for predictions, without labels at the source."""
        return tuple(name.replace("validation", "test") for name in self.validation_splits)


GLUE_TASKS = {
    "cola": GlueTask(("sentence",), 2, "matthews"),
    "sst2": GlueTask(("sentence",), 2, "accuracy"),
    "mrpc": GlueTask(("sentence1", "sentence2"), 2, "accuracy"),
    "qqp": GlueTask(("question1", "question2"), 2, "accuracy"),
    "stsb": GlueTask(("sentence1", "sentence2"), 1, "pearson"),
    "mnli": GlueTask(("premise", "hypothesis"), 3, "accuracy", ("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence"), 2, "accuracy"),
    "rte": GlueTask(("sentence1", "sentence2"), 2, "accuracy"),
}


def glue_task(name: str) -> GlueTask:
    """Look up a task by name.

    Raises:
        DataError: There is no such task.
    """
    if name not in GLUE_TASKS:
        raise DataError(f"unknown GLUE task {name!r}{meant(name, GLUE_TASKS)}; known are {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[name]


class GlueData(TextData):
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
            are then the test set, and no checkpoint is chosen by looking at them. With 0 they are both, unless the
            source has a labelled test split.
        train_rows: Train on a random subset of this many rows; all of them by default. A larger subset contains the
            smaller ones of the same seed.
        seed: Decides the holdout, the subset and the order of training batches.

    Attributes:
        glue: The task's columns, number of labels and metric.
    """

    predict_role = "predict"

    def __init__(
        self,
        task: str,
        tokenizer: str,
        source: str = "nyu-mll/glue",
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        holdout: float = 0.0,
        train_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        self.glue = glue_task(task)
        self.validation_splits, self.test_splits = self.glue.validation_splits, self.glue.test_splits
        self.columns = (*self.glue.text_columns, "label")
        super().__init__(
            task=task,
            tokenizer=tokenizer,
            source=source,
            subset=task,
            revision=None,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            holdout=holdout,
            train_rows=train_rows,
            seed=seed,
        )

    def rows(self, role: str) -> list[Dataset]:
        """Returns the checked rows of a role; for predictions those of ``test.*``, labelled or not, if there are."""
        if role == "predict" and (names := [name for name in self.test_splits if name in self._splits]):
            return [self.split(name, self.glue.text_columns) for name in names]
        return super().rows(role)

    def prepare(self, role: str) -> list[Dataset]:
        """Tokenises the sentences."""
        rows = self.rows(role)
        if role == "train" and len(values := sorted(set(rows[0]["label"][:]))) < 2:
            where = self._name("train")
            raise DataError(f"the {len(rows[0])} training rows of {where} have one label only: {values}")
        return [tokenize(part, self.tokenizer, self.glue.text_columns, self.max_length) for part in rows]

    def collate(self) -> Collate:
        """Pads, and makes the labels a tensor."""
        return Collate(self.tokenizer, torch.float32 if self.glue.labels == 1 else torch.long)

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that sentences are text and labels in their range."""
        require_text(rows, self.glue.text_columns, name)
        for row, label in enumerate(rows["label"][:] if "label" in rows.column_names else []):
            if self.glue.labels == 1:
                if not isinstance(label, (int, float)) or not math.isfinite(label):
                    raise DataError(f"{name}, row {row} (from 0): label is {label!r}, not a finite number")
            elif label not in range(self.glue.labels):
                raise DataError(
                    f"{name}, row {row} (from 0): label is {label!r}, not one of 0 to {self.glue.labels - 1}"
                )

    def has_targets(self, rows: Dataset) -> bool:
        """Says whether a split is labelled: the hub's test splits of GLUE are not."""
        return "label" in rows.column_names and not set(rows["label"][:]) <= {-1, None}

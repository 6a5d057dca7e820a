"""The GLUE tasks as a data module, from the hub or from a folder."""

import difflib
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, load_dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import BucketBatchSampler, Collate, find_split, load_tokenizer, read_split, tokenize


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
        raise DataError(f"unknown GLUE task {name!r}{_meant(name, GLUE_TASKS)}; known are {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[name]


class GlueData(LightningDataModule):
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
        super().__init__()
        self.glue = glue_task(task)
        if not 0 <= holdout <= 0.5:
            raise DataError(f"holdout is {holdout}, but must be a share of the training rows from 0 to 0.5")
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("train_rows", train_rows, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise DataError(f"{name} is {value}, but must be at least {least}")
        self.task = task
        self.source = source
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.holdout = holdout
        self.train_rows = train_rows
        self.seed = seed
        self._tokenizer_name = tokenizer
        self._ready: dict[str, list[Dataset]] = {}

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first needed."""
        return load_tokenizer(self._tokenizer_name)

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split that the source has; a subclass may read its own."""
        if Path(self.source).is_file():
            raise DataError(
                f"{self.source} is a file; name the folder that holds train.* and {self.glue.validation_splits[0]}.*"
            )
        if not (self.source.startswith((".", "/")) or self.source.endswith("/") or Path(self.source).is_dir()):
            try:
                return dict(load_dataset(self.source, self.task))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"no folder {self.source!r}, and cannot load {self.task} from the hub's data set of that name "
                    f"(offline, only what was downloaded before is found): {error}"
                ) from error
        names = dict.fromkeys(("train", *self.glue.validation_splits, "test", *self.glue.test_splits))
        return {name: read_split(self.source, name) for name in names if find_split(self.source, name)}

    def setup(self, stage: str) -> None:
        """Read, check and tokenise what the stage needs and no earlier one has prepared."""
        for role in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,)):
            if role not in self._ready:
                columns = self.glue.text_columns
                rows = self._rows(role)
                self._ready[role] = [tokenize(part, self.tokenizer, columns, self.max_length) for part in rows]

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, other ones in each epoch."""
        return self._loader(self._ready["train"][0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every validation row once; a list for a task with several validation sets."""
        return _one_or_all([self._loader(rows, self.eval_batch_size) for rows in self._ready["validation"]])

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every test row once."""
        return _one_or_all([self._loader(rows, self.eval_batch_size) for rows in self._ready["test"]])

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The rows of ``test.*``, labelled or not, in the order of the file; without it, what the test is run on."""
        replicas, rank = self._processes()
        return _one_or_all(
            [
                DataLoader(
                    rows,
                    # By keyword: Lightning makes this loader again, from the arguments that it saw.
                    batch_size=self.eval_batch_size,
                    # Lightning leaves a DistributedSampler alone, whatever use_distributed_sampler says.
                    sampler=UnrepeatedDistributedSampler(rows, replicas, rank, shuffle=False),
                    collate_fn=self._collate(),
                )
                for rows in self._ready["predict"]
            ]
        )

    def _loader(self, rows: Dataset, batch_size: int, shuffle: bool = False) -> DataLoader:
        # No workers: the rows are tokenised and mapped into memory, and handing a batch over between processes would
        # cost more than making it. Lightning recommends workers to everybody.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        batches = BucketBatchSampler(rows["length"][:], batch_size, shuffle, self.seed, *self._processes())
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._collate())

    def _collate(self) -> Collate:
        return Collate(self.tokenizer, torch.float32 if self.glue.labels == 1 else torch.long)

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @functools.cached_property
    def _splits(self) -> dict[str, Dataset]:
        return self.load_splits()

    def _rows(self, role: str) -> list[Dataset]:
        if role == "train":
            return [self._training_rows()[0]]
        if role == "validation" and self.holdout:
            return [self._training_rows()[1]]
        if role == "test" and not self.holdout and _labelled(self._splits.get("test")):
            return [self._split("test")]
        if role == "predict" and (names := [name for name in self.glue.test_splits if name in self._splits]):
            return [self._split(name, labelled=False) for name in names]
        return [self._split(name) for name in self.glue.validation_splits]

    def _training_rows(self) -> tuple[Dataset, Dataset]:
        rows = self._split("train")
        held_out = max(1, round(self.holdout * len(rows))) if self.holdout else 0
        left = len(rows) - held_out
        if self.train_rows is not None and self.train_rows > left:
            raise DataError(f"train_rows is {self.train_rows}, but {self._name('train')} has {left} rows for training")
        order = np.random.default_rng(self.seed).permutation(len(rows))
        chosen = order[held_out:][: self.train_rows]
        training = rows.select(np.sort(chosen))
        values = sorted(set(training["label"][:]))
        if len(values) < 2:
            raise DataError(f"the {len(training)} training rows of {self._name('train')} have one label only: {values}")
        return training, rows.select(np.sort(order[:held_out]))

    def _split(self, name: str, labelled: bool = True) -> Dataset:
        if name not in self._splits:
            raise DataError(
                f"{self.source} has no split {name!r} for {self.task} (found: {', '.join(self._splits) or 'none'}); "
                f"a folder needs {name}.jsonl, or .json, .csv, .tsv, .parquet"
            )
        _check_rows(self._splits[name], self._name(name), self.glue, labelled)
        return self._splits[name].select_columns([*self.glue.text_columns, *(["label"] if labelled else [])])

    def _name(self, split: str) -> str:
        return f"{self.task}/{split} from {self.source}"


def _check_rows(rows: Dataset, name: str, task: GlueTask, labelled: bool) -> None:
    if len(rows) == 0:
        raise DataError(f"{name} has no rows")
    for column in (*task.text_columns, *(["label"] if labelled else [])):
        if column not in rows.column_names:
            meant = _meant(column, rows.column_names)
            raise DataError(f"{name} has no column {column!r}{meant}; it has {', '.join(rows.column_names)}")
    for column in task.text_columns:
        for row, text in enumerate(rows[column][:]):
            if not isinstance(text, str):
                raise DataError(f"{name}, row {row} (from 0): {column} is {text!r}, not text")
    for row, label in enumerate(rows["label"][:] if labelled else []):
        if task.labels == 1:
            if not isinstance(label, (int, float)) or not math.isfinite(label):
                raise DataError(f"{name}, row {row} (from 0): label is {label!r}, not a finite number")
        elif label not in range(task.labels):
            raise DataError(f"{name}, row {row} (from 0): label is {label!r}, not one of 0 to {task.labels - 1}")


def _labelled(rows: Dataset | None) -> bool:
    return rows is not None and "label" in rows.column_names and not set(rows["label"][:]) <= {-1, None}


def _meant(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (do you mean {nearest[0]!r}?)" if nearest else ""


def _one_or_all(loaders: list[DataLoader]) -> DataLoader | list[DataLoader]:
    return loaders[0] if len(loaders) == 1 else loaders

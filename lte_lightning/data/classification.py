"""Classification and regression: texts and labels from a file, a folder or the hub."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lte_lightning.data.base import TextData
from lte_lightning.data.checks import count_blank, report_blank, require_text, rows_of
from lte_lightning.data.files import COMPRESSIONS, LABEL, read_split, suffix_of
from lte_lightning.data.labels import (
    Labels,
    classes_of,
    cleaned,
    find_classes,
    is_missing,
    listed,
    model_config,
    require_labels,
    require_two,
    stratified,
)
from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import Collate, tokenize


class ClassificationData(TextData):
    """Texts, or pairs of texts, with a class or a number each, tokenised once, in batches of similar length.

    The classes are those of the training rows, in the order of the model if it was fine-tuned for them. One file is cut
    into training and validation rows; these are also the test's.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: One file (csv, tsv, jsonl, json, parquet; compressed or not), folder with train.*, and perhaps
            validation.* and test.*, or id of a data set on the hub.
        text: Name of the column to read, or of two that are read as a pair: `[question,answer]`.
        label: Name of the column to predict: texts or whole numbers.
        classes: The labels, in the order of the model's outputs; by default those of the training rows.
        regression: The labels are numbers to predict, and not classes.
        task: Name of the task, for the results; by default that of the source.
        **kwargs: See `TextData`.

    Attributes:
        metric: The reported metric if the model names none.
    """

    hint = "; set data.text and data.label to your columns' names (the first line of a table)"
    predict_role = "predict"
    stratifies = True

    def __init__(
        self,
        tokenizer: str,
        source: str,
        text: list[str] | str = "text",
        label: str = "label",
        classes: list[str] | None = None,
        regression: bool = False,
        task: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_columns = (text,) if isinstance(text, str) else tuple(text)
        if len(self.text_columns) not in (1, 2) or len({*self.text_columns, label}) <= len(self.text_columns):
            raise DataError(
                f"text is {text!r} and label {label!r}: name one column of text, or two that are read as a pair, and "
                "another one of labels"
            )
        if regression and classes:
            raise DataError(f"classes is {classes!r}, but regression has none: leave one of them out")
        self.label = label
        self.regression = regression
        self.columns, self.targets = (*self.text_columns, label), (label,)
        self.metric = "pearson" if regression else "accuracy"
        self._given_classes = tuple(classes) if classes else None
        super().__init__(
            task=task or task_name(source, kwargs.get("subset")), tokenizer=tokenizer, source=source, **kwargs
        )

    # Labels

    @functools.cached_property
    def labels(self) -> Labels | None:
        """The classes in the order of the model's outputs; None for regression."""
        if self.regression:
            return None
        config = classes_of(model_config(self._tokenizer_name))
        names = config[1] if config else None
        if self.classes is None:
            if not names:
                raise DataError(
                    f"{self.source} has no column {self.label!r}, so its classes are unknown: name the fine-tuned "
                    "model with --model.init_from RUN/model, or set data.classes"
                )
            return Labels(tuple(names))
        return self.classes if self._given_classes else self.classes.in_order_of(names)

    @functools.cached_property
    def classes(self) -> Labels | None:
        """The classes: those that the user gave, or those of the training rows. None if no row has a class."""
        if self.regression:
            return None
        splits = self._splits
        names = [name for name in (*(("train",) if "train" in splits else splits),) if self.has_targets(splits[name])]
        if self._given_classes:
            values = [find_classes(splits[name], self.label, self._name(name)).values for name in names[:1]]
            return _in_data_type(self._given_classes, values[0] if values else ())
        if not names:
            return None
        classes = [find_classes(splits[name], self.label, self._name(name)) for name in names]
        return classes[0] if len(classes) == 1 else Labels(tuple(sorted({v for part in classes for v in part.values})))

    def expected(self) -> str:
        """Returns a description of a right label, for messages."""
        if self.classes is None:
            return "a finite number"
        whose = "given" if self._given_classes else "of the training rows"
        return f"one of the {len(self.classes)} classes {whose}: {self.classes}"

    def has_targets(self, rows: Dataset) -> bool:
        """Says whether a split is labelled."""
        return self.label in rows.column_names and not all(map(is_missing, rows[self.label][:]))

    # Rows

    def read(self, split: str) -> Dataset:
        """Returns the rows of a local split."""
        return read_split(self.source, split, self.label, self.formats, decimal_commas=self.regression)

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split that the source has, with clean labels."""
        splits = super().load_splits()
        if self.regression:
            return splits
        return {k: cleaned(rows, self.label) if self.label in rows.column_names else rows for k, rows in splits.items()}

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that texts are text, and labels known classes or numbers."""
        require_text(rows, self.text_columns, name)
        for column in self.text_columns:
            report_blank(count_blank(rows[column]), len(rows), column, name)
        if self.label in rows.column_names:
            require_labels(rows, self.label, self.classes, self.expected(), name)

    def shuffled(self, rows: Dataset, held_out: int) -> np.ndarray:
        """Returns the training rows in the order of choice; the held-out rows keep each class's share."""
        order = super().shuffled(rows, held_out)
        if self.regression or not self.stratifies:
            return order
        return stratified(rows[self.label][:], order, held_out, self._name("train"))

    def prepare(self, role: str) -> list[Dataset]:
        """Tokenises the texts, and numbers the classes."""
        sets = self.rows(role)
        if role == "train":
            require_two(sets[0][self.label][:], self._name("train"))
            if self.labels:
                if alike := self.labels.alike():
                    rank_zero_warn(
                        f"classes differ in upper and lower case alone, and count as several: {listed(alike)}; write "
                        "them alike if they are one"
                    )
                rank_zero_info(
                    f"{self._name('train')}: {len(sets[0])} rows of {len(self.labels)} classes, {self.labels}"
                )
        return [self._tokenized(rows, role) for rows in sets]

    def _tokenized(self, rows: Dataset, role: str) -> Dataset:
        if self.label in rows.column_names and (self.label != LABEL or not self._are_numbered):
            index = self.labels.index() if self.labels else None
            labels = [index[label] if index else label for label in rows[self.label][:]]
            rows = rows.remove_columns(self.label).add_column(LABEL, labels)
        tokens = tokenize(rows, self.tokenizer, self.text_columns, self.max_length)
        if full := sum(length == self.max_length for length in tokens["length"][:]):
            rank_zero_info(
                f"{full} of {len(rows)} {rows_of(role)} fill max_length, {self.max_length} tokens: more is cut"
            )
        return tokens

    @property
    def _are_numbered(self) -> bool:
        return self.labels is None or self.labels.values == tuple(range(len(self.labels)))

    def collate(self) -> Collate:
        """Pads the texts, and puts the labels into a tensor."""
        return Collate(self.tokenizer, torch.float32 if self.regression else torch.long)


def task_name(source: str, subset: str | None = None) -> str:
    """Returns a short name for a source: that of the file, the folder, or the hub's data set."""
    name = Path(source.rstrip("/")).name
    for suffix in (*COMPRESSIONS, suffix_of(name) if suffix_of(name) in TextData.formats else ""):
        if name.lower().endswith(suffix):
            name = name[: len(name) - len(suffix)]
    return re.sub(r"[^\w.-]+", "-", f"{name}-{subset}" if subset else name) or "classification"


def _in_data_type(classes: tuple[str, ...], values: tuple[Any, ...]) -> Labels:
    """Returns the user's classes in the data's type, because the command line gives whole numbers as text."""
    like = {str(value): value for value in values}
    return Labels(tuple(like.get(str(name), name) for name in classes), tuple(map(str, classes)))

"""The classes of a classification: collected from the rows, named, in the order of a fine-tuned model."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import AutoConfig, PreTrainedConfig

from lte_lightning.core.model.head import classifies
from lte_lightning.data.packaged import DataError, resolve
from lte_lightning.errors import meant

_SHOWN = 8  # classes that a message names


@dataclass(frozen=True)
class Labels:
    """Classes in the order of a model's outputs.

    Args:
        values: Each class as the data write it: texts, whole numbers or truth values.
        names: Names for people; by default the values.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.names or tuple(map(str, self.values)))

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        return listed(self.names)

    def index(self) -> dict[Any, int]:
        """Returns the number of each class by its value."""
        return {value: number for number, value in enumerate(self.values)}

    def alike(self) -> list[str]:
        """Returns the names that differ from another one in upper and lower case alone."""
        counts = Counter(name.casefold() for name in self.names)
        return [name for name in self.names if counts[name.casefold()] > 1]

    def in_order_of(self, names: Sequence[str] | None) -> "Labels":
        """Returns the model's classes, in its order, if they include all of these classes; otherwise these.

        Args:
            names: The model's classes; None if it names none.
        """
        model_names = tuple(names or ())
        own_index = {name.casefold(): i for i, name in enumerate(self.names)}
        model_keys = [name.casefold() for name in model_names]
        if not set(own_index) <= set(model_keys) or len(set(model_keys)) < len(model_keys):
            return self
        numbers = [own_index.get(key) for key in model_keys]
        values = tuple(
            _value_like(self.values[0], name) if i is None else self.values[i]
            for i, name in zip(numbers, model_names, strict=True)
        )
        pairs = zip(numbers, model_names, strict=True)
        return Labels(values, tuple(name if i is None else self.names[i] for i, name in pairs))


def listed(names: Iterable[Any]) -> str:
    """Returns names in a list for messages; of many names the first."""
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def is_missing(label: Any) -> bool:
    """Says whether a row has no label: None, an empty text, or NaN."""
    return label is None or (isinstance(label, float) and math.isnan(label)) or label == ""


def cleaned(rows: Dataset, column: str) -> Dataset:
    """Returns the rows with labels stripped of white space, and whole numbers as integers."""
    labels = rows[column][:]
    if len({isinstance(label, str) for label in labels if not is_missing(label)}) > 1:
        return rows  # texts and numbers: `find_classes` refuses them
    feature = rows.features[column]
    named = isinstance(feature, ClassLabel)
    if named:  # Hugging Face marks rows without a label by -1
        clean = [None if label == -1 else label for label in labels]
    elif any(isinstance(label, str) for label in labels):
        clean = [label.strip() or None if isinstance(label, str) else label for label in labels]
    elif all(is_missing(label) or (isinstance(label, float) and _is_whole(label)) for label in labels):
        clean = [None if is_missing(label) else int(label) for label in labels]
    else:
        return rows
    if clean == labels and not any(isinstance(label, float) for label in labels):  # 1.0 == 1
        return rows
    changed = rows.remove_columns(column).add_column(column, clean, feature=feature if named else None)
    return changed.select_columns(rows.column_names)


def require_labels(rows: Dataset, column: str, classes: Labels | None, expected: str, where: str) -> None:
    """Checks that every label is one of the classes.

    Args:
        rows: A split.
        column: Of the labels.
        classes: None if labels are finite numbers.
        expected: Description of a right label, for the message.
        where: Name of the split.
    """
    labels = rows[column][:]
    known = None if classes is None else set(classes.values)
    for row, label in enumerate(labels):
        if not _is_number(label) if known is None else isinstance(label, list | dict) or label not in known:
            near = meant(label, map(str, known or ())) if isinstance(label, str) else ""
            missing = sum(map(is_missing, labels))
            also = f"; {missing} of {len(labels)} rows have no {column}: label or remove them" if missing else ""
            raise DataError(f"{where}, row {row} (from 0): {column} is {label!r}, not {expected}{near}{also}")


def find_classes(rows: Dataset, column: str, where: str) -> Labels:
    """Returns the classes of labelled rows: those that a hub data set declares, or the sorted values.

    Raises:
        DataError: If a label is a number with a fraction, or a list.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return Labels(tuple(range(feature.num_classes)), tuple(feature.names))
    labels = [label for label in rows[column][:] if not is_missing(label)]
    kinds = {isinstance(label, str): label for label in labels}
    if len(kinds) > 1:
        raise DataError(
            f"{where}: {column} has texts ({kinds[True]!r:.200}) and others ({kinds[False]!r:.200}): write all as texts"
        )
    for row, label in enumerate(labels):
        if isinstance(label, float):
            broken = next((value for value in labels if isinstance(value, float) and not _is_whole(value)), label)
            raise DataError(
                f"{where}: {column} has numbers such as {broken!r}, which are no classes: to predict numbers, set "
                "data.regression to true"
            )
        if not isinstance(label, str | int):
            raise DataError(
                f"{where}, row {row} (from 0): {column} is {label!r:.200}; a row has one class, a "
                "text or a whole number"
            )
    return Labels(tuple(sorted(set(labels))))


def require_two(labels: Iterable[Any], where: str) -> None:
    """Checks that training rows have more than one label."""
    labels = list(labels)
    if len(values := sorted(set(labels))) < 2:
        raise DataError(f"the {len(labels)} training rows of {where} have one label only: {values}")


def stratified(labels: Sequence[Any], order: np.ndarray, count: int, where: str) -> np.ndarray:
    """Returns an order of rows whose first `count` have each class as often as all rows have it.

    Args:
        labels: Class of each row.
        order: A random order of the rows.
        count: Approximate number of rows.
        where: Name of the rows.

    Raises:
        DataError: If a class has a single row, which cannot be both trained on and held out.
    """
    sizes = Counter(labels)
    single = [label for label, size in sizes.items() if size == 1]
    if count and single:
        raise DataError(
            f"{where}: {len(single)} of {len(sizes)} classes have one row only ({listed(map(repr, single))}), so "
            "they cannot be in both training and validation: add rows, remove the class, or give a validation file"
        )
    # The i-th row of a class of n rows is placed at (i + 0.5) / n, so each class is spread evenly from 0 to 1
    placed: Counter[Any] = Counter()
    fractions = np.zeros(len(order))
    for position, row in enumerate(order):
        label = labels[row]
        fractions[position] = (placed[label] + 0.5) / sizes[label]
        placed[label] += 1
    return order[np.argsort(fractions, kind="stable")]


def model_config(name: str) -> PreTrainedConfig | None:
    """Returns the configuration in a model's folder or on the hub; None where there is none."""
    folder = resolve(name)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").exists():
        return None
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return None  # loading the model reports the error


def classes_of(config: PreTrainedConfig | None) -> tuple[int, list[str] | None] | None:
    """Returns how many classes a model was fine-tuned for, and their names unless these are mere numbers.

    Args:
        config: The model's configuration. None gives None, and so does a model that classifies nothing.
    """
    if config is None or not any(map(classifies, config.architectures or [])):
        return None
    labels = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    names = [labels[number] for number in range(len(labels))]
    generic = names == [f"LABEL_{number}" for number in range(len(labels))]
    return len(labels), None if generic else names


def _is_whole(number: float) -> bool:
    return number.is_integer() and abs(number) < 2**63


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)


def _value_like(value: Any, name: str) -> Any:
    """Returns the value, in the data's type, of a class that the model names and the data lack."""
    return int(name) if isinstance(value, int) and name.lstrip("-").isdigit() else name

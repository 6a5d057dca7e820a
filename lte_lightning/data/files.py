"""Where rows come from: the files of a split, in a folder or named one by one."""

import difflib
import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from lte_lightning.data.packaged import DataError

_CSV = {
    # Sentences like "None" and "NA" are text. Only a missing label is missing: else it would turn its column into text.
    "keep_default_na": False,
    "na_values": {"label": [""]},
}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def find_split(source: str | Path, split: str) -> Path | None:
    """Find the file of a split.

    Args:
        source: A folder with `<split>.jsonl` (or json, csv, tsv, parquet), or a file, which is then the split itself.
        split: `train`, `validation`, ...

    Returns:
        The file, or None if the folder has none for this split.

    Raises:
        DataError: There is no such folder or file, or the folder has several files for the split.
    """
    source = Path(source)
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"no folder or file {source}; expected a folder with {_accepted(split)}")
    found = [source / (split + suffix) for suffix in _READERS if (source / (split + suffix)).is_file()]
    if len(found) > 1:
        raise DataError(f"{source} has {' and '.join(file.name for file in found)}: keep one of them")
    return found[0] if found else None


def read_split(source: str | Path, split: str) -> Dataset:
    """Read one split from a local folder or file.

    Args:
        source: A folder with `<split>.jsonl` (or json, csv, tsv, parquet), or a file.
        split: `train`, `validation`, ...

    Raises:
        DataError: The file is missing, ambiguous, of an unknown kind, empty or not readable.
    """
    return _load(source, split)


def stream_split(source: str | Path, split: str) -> IterableDataset:
    """Open one split of a local folder or file as a stream.

    Args:
        source: As for `read_split`.
        split: `train`, `validation`, ...

    Raises:
        DataError: The file is missing, ambiguous, of an unknown kind, or empty; what else is wrong is found on reading.
    """
    return _load(source, split, streaming=True)


def _load(source: str | Path, split: str, **how: bool) -> Any:
    file = find_split(source, split)
    if file is None:
        raise DataError(f"{source} has no split {split!r}; expected {_accepted(split)}")
    if file.suffix not in _READERS:
        raise DataError(f"cannot read {file}: accepted are {', '.join(_READERS)}")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty")
    kind, options = _READERS[file.suffix]
    # load_dataset reads a path as a pattern, and brackets in a folder's name are not one.
    pattern = glob.escape(str(file.resolve()))
    try:
        return load_dataset(kind, data_files={"train": pattern}, split="train", **options, **how)
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(f"{file} has no rows, or is not {file.suffix[1:]}: {error.__cause__ or error}") from error


def _accepted(split: str) -> str:
    return f"{split}{{{','.join(_READERS)}}}"


def meant(name: str, known: Iterable[str]) -> str:
    """Returns a remark that names the known word nearest to one that is unknown, or nothing."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (do you mean {nearest[0]!r}?)" if nearest else ""

"""Files of rows: a split in a folder or single files, compressed or not."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from lte_lightning.data.csv_files import csv_options
from lte_lightning.data.packaged import DataError
from lte_lightning.documents import DocumentError, check_rows
from lte_lightning.errors import meant_path

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORMATS = (*TABLES, ".txt")
_BUILDERS = dict(zip((*FORMATS, ".md"), ("json", "json", "csv", "csv", "parquet", "text", "text"), strict=True))
_NOT_UTF8 = (
    "is not UTF-8 text: convert it; from Latin-1, for example, by iconv -f latin1 -t utf-8 OLD > NEW (utf-16 is what "
    "Excel calls Unicode text)"
)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
LABEL = "label"


def suffix_of(file: str | Path) -> str:
    """Returns the suffix of a file's name, without that of a compression."""
    file = Path(file)
    return (Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix).lower()


def find_split(source: str | Path, split: str, formats: Sequence[str] = FORMATS) -> Path | None:
    """Find the file of a split.

    Args:
        source: A folder with `<split>.jsonl` (or another format), or a file, which is then the split itself.
        split: `train`, `validation`, ...
        formats: Which files count.

    Returns:
        The file, or None if the folder has none for this split.

    Raises:
        DataError: There is no such folder or file, or the folder has several files for the split.
    """
    source = Path(source)
    if source.is_file():
        return source
    if not source.is_dir():
        near = meant_path(source)
        raise DataError(f"no folder or file {source}{near}; expected a folder with {_accepted(split, formats)}")
    names = [split + suffix + packed for suffix in formats for packed in ("", *COMPRESSIONS)]
    files = [source / name for name in names if (source / name).is_file()]
    if len(files) > 1:
        raise DataError(f"{source} has {' and '.join(file.name for file in files)}: keep one of them")
    return files[0] if files else None


def other_files(source: str | Path, splits: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Returns the names of files that could be read, but are of no split; none if the source is no folder."""
    folder = Path(source)
    files = [file for file in (folder.iterdir() if folder.is_dir() else ()) if suffix_of(file) in formats]
    return sorted(file.name for file in files if file.name.partition(".")[0] not in ("", "README", *splits))


def find_files(folder: str | Path) -> list[Path]:
    """Returns all files in a folder and below, but not hidden ones, in the order of their names."""
    root = Path(folder)
    files = [file for file in root.rglob("*") if file.is_file()]
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts))


def read_shards(folder: str | Path, splits: Sequence[str]) -> dict[str, Dataset]:
    """Read the splits of a folder as the hub stores them: `data/train-00000-of-00002.parquet` and so on.

    Args:
        folder: The folder; its files may stand in it or in its folder `data`.
        splits: Which ones to read; those without files are left out.

    Raises:
        DataError: Some files of a split are missing or not readable.
    """
    read = {}
    for split in splits:
        pattern = f"{glob.escape(split)}-?????-of-?????*.parquet"
        files = [file for place in (Path(folder), Path(folder, "data")) for file in sorted(place.glob(pattern))]
        if not files:
            continue
        count = files[0].name.removeprefix(f"{split}-").split("-of-")[1][:5]
        if str(len(files)).zfill(5) != count:
            raise DataError(f"{files[0].parent} has {len(files)} of the {int(count)} files of {split}: add the others")
        read[split] = _load(*files)
    return read


def read_split(
    source: str | Path,
    split: str,
    label: str = LABEL,
    formats: Sequence[str] = FORMATS,
    decimal_commas: bool = False,
) -> Dataset:
    """Read one split from a local folder or file.

    All columns of a CSV or TSV file are text, but for the label's, which are numbers if all of them are.

    Args:
        source: A folder with `<split>.jsonl` (or another format), or a file.
        split: `train`, `validation`, ...
        label: Name of the labels' column. An empty label is None.
        formats: Which files count.
        decimal_commas: Whether labels such as 0,5 are numbers.

    Raises:
        DataError: The file is missing, ambiguous, of an unknown kind, empty or not readable.
    """
    file = _require(source, split, formats)
    rows, kind = _load(file), _BUILDERS[suffix_of(file)]
    if len(rows) == 0:
        raise DataError(f"{file} has no rows")
    if kind == "json":
        try:
            rows.data.validate(full=True)
        except ArrowInvalid as error:
            raise DataError(f"{file} {_NOT_UTF8}") from error
    is_text = kind == "csv" and label in rows.column_names
    return _with_numbers(rows, label, decimal_commas) if is_text else rows


def stream_split(source: str | Path, split: str, formats: Sequence[str] = FORMATS) -> IterableDataset:
    """Open one split of a local folder or file as a stream.

    Args:
        source: As for `read_split`.
        split: `train`, `validation`, ...
        formats: Which files count.

    Raises:
        DataError: The file is missing, ambiguous, of an unknown kind, or empty; what else is wrong is found on reading.
    """
    return _load(_require(source, split, formats), streaming=True)


def _require(source: str | Path, split: str, formats: Sequence[str]) -> Path:
    file = find_split(source, split, formats)
    if file is None:
        raise DataError(f"{source} has no split {split!r}; expected {_accepted(split, formats)}")
    if suffix_of(file) not in formats:
        raise DataError(f"cannot read {file}: accepted are {', '.join(formats)}, compressed ({_PACKED}) or not")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty")
    return file


def _load(file: Path, *more: Path, **how: bool) -> Any:
    suffix = suffix_of(file)
    # load_dataset reads a path as a pattern, and brackets in a folder's name are not one.
    patterns = [glob.escape(str(each.resolve())) for each in (file, *more)]
    try:
        if _BUILDERS[suffix] == "json":
            with fsspec.open(file, compression="infer") as lines:
                check_rows(lines)
        options = csv_options(file, suffix) if _BUILDERS[suffix] == "csv" else {}
        if _BUILDERS[suffix] == "text":
            options = {"encoding": "utf-8-sig"}  # Windows' editors begin a file with a mark, which is no text
        return load_dataset(_BUILDERS[suffix], data_files={"train": patterns}, split="train", **options, **how)
    except DocumentError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(_refusal(file, suffix, error)) from error


def _refusal(file: Path, suffix: str, error: Exception) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"{file} {_NOT_UTF8}"
    quotes = (
        "; a text that contains the separator stands in quotation marks" if "Error tokenizing" in str(cause) else ""
    )
    return f"{file} has no rows, or is not {suffix[1:]}: {str(cause).strip()}{quotes}"


def _with_numbers(rows: Dataset, column: str, decimal_commas: bool) -> Dataset:
    """Turns a column of text into numbers if all its values are numbers."""
    values = [value or None for value in rows[column][:]]
    if decimal_commas and not any(_THOUSANDS.fullmatch(value) for value in values if value):
        values = [re.sub(r"^([+-]?\d*),(\d+)$", r"\1.\2", value) if value else None for value in values]
    texts = {value for value in values if value is not None}
    numbers: list[Any] = values
    if texts and all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", value) for value in texts):  # 007 is no number
        numbers = [None if value is None else int(value) for value in values]
    elif texts and all(_NUMBER.fullmatch(value) and not re.fullmatch(r"[+-]?\d{19,}", value) for value in texts):
        numbers = [None if value is None else float(value) for value in values]
    return rows.remove_columns(column).add_column(column, numbers).select_columns(rows.column_names)


_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_PACKED = ", ".join(COMPRESSIONS)


def _accepted(split: str, formats: Sequence[str]) -> str:
    return f"{split}{{{','.join(formats)}}}"

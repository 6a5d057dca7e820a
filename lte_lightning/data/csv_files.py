"""Files with separators: which one it is, what the columns are called, and whether quotation marks swallow rows."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
from datasets import Features, Value
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lte_lightning.documents import DocumentError

_NAMED = re.compile(r"sep=(.)[\r\n]*")  # first line with which Excel names the separator


def csv_options(file: Path, suffix: str) -> dict[str, Any]:
    """Returns how to read a file with separators: `load_dataset`'s options.

    Args:
        file: The file, compressed or not.
        suffix: `.csv` or `.tsv`; the first line may show another separator.

    Raises:
        DocumentError: If a stray quotation mark makes one text of several rows.
    """
    separator, skipped = "\t" if suffix == ".tsv" else ",", 0
    with _opened(file) as lines:
        if told := _NAMED.fullmatch(next(lines, "")):
            separator, skipped = told[1], 1
    read_csv = partial(pd.read_csv, file, skiprows=skipped, dtype=str, keep_default_na=False, compression="infer")
    names = list(read_csv(nrows=0, sep=separator).columns)
    # What Excel writes where the comma is the decimal sign; the rows may have commas, the names decide
    if len(names) == 1 and not skipped:
        separator = next((mark for mark in ";\t|," if mark in names[0]), separator)
        names = list(read_csv(nrows=0, sep=separator).columns)
    # `review, "stars"`: without this the marks after a space would be part of the text, and names begin with spaces
    spaced = len(names) > 1 and all(name.startswith(" ") for name in names[1:])
    read_csv = partial(read_csv, sep=separator, skipinitialspace=spaced)
    names = list(read_csv(nrows=0).columns)
    # pandas would take the first column for row numbers where rows have a field more than the header; so it refuses.
    head = list(read_csv(header=None, nrows=2).iloc[0])
    if twice := [name for name, count in Counter(head).items() if count > 1 and name]:
        rank_zero_warn(f"{file} has several columns of the name {', '.join(twice)}: the first of them is read")
    with _opened(file) as lines:
        crowded = _check_quotes(lines, separator, spaced)
    if crowded:
        rank_zero_warn(
            f"{file} has {crowded} rows whose text between quotation marks has tabs and line breaks: if the marks are "
            "part of the texts, rows are lost in it; write such marks twice and the text between marks"
        )
    # All as text: pandas guesses types anew every 10,000 rows, and sentences like "None" and "NA" are text.
    features = Features({name: Value("string") for name in names})
    shared = {"sep": separator, "skiprows": skipped, "skipinitialspace": spaced, "keep_default_na": False}
    return shared | {"features": features}


def _opened(file: Path) -> Any:
    return fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", newline="")


def _check_quotes(lines: Iterable[str], separator: str, spaced: bool) -> int:
    """Checks that no stray quotation mark swallows rows: pandas reads on to the next mark, whatever follows that.

    Args:
        lines: Of the file.
        separator: Between fields.
        spaced: Spaces after a separator are no part of a field.

    Returns:
        In a file of tabs, how many rows have a text with tabs and line breaks, which texts rarely have.
    """
    limit = csv.field_size_limit(sys.maxsize)
    rows = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)
    crowded = 0
    try:
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return crowded
            except csv.Error as error:
                if rows.line_num > first:
                    raise DocumentError(
                        f"line {first}: a quotation mark opens a text that does not end before line "
                        f"{rows.line_num}, so these rows would be one ({error}): write each mark within a text twice "
                        "and the whole text between marks, or remove the mark"
                    ) from error
            else:
                crowded += separator == "\t" and any("\t" in field and "\n" in field for field in row)
    finally:
        csv.field_size_limit(limit)

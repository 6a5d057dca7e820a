"""Reads the CSV files of ``lte bench`` and ``lte curve``."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError

WORDS = ("shape", "scope", "phase", "backend")
# Each with its least and greatest value; what is measured is never zero
LEAST, ANY = 1e-300, math.inf
NUMBERS = {
    "tokens": (1, ANY),
    "sparsity": (0, 1),
    "ms": (LEAST, ANY),
    "dense_ms": (LEAST, ANY),
    "ratio": (LEAST, ANY),
    "bound": (LEAST, ANY),
}
# Older files may lack these
MORE_NUMBERS = {"threads": (1, ANY), "router_ms": (0, ANY), "share_of_bound": (0, ANY), "load": (0, ANY)}
# Of lte curve, which has one column more: the metric
POINT = {"sparsity": (0, 1), "gflops_per_token": (LEAST, ANY), "tokens_per_second": (LEAST, ANY)}
# What rows of one picture have in common
SAME = ("file", "shape", "scope", "phase", "device", "dtype", "threads", "tokens")


def read_bench(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a benchmark or a curve, with numbers parsed, each with its ``file``.

    Raises:
        UserError: If the file is not from ``lte bench`` or ``lte curve``, has no row, or holds an invalid value.
    """
    rows: list[dict[str, Any]] = []
    number = 1
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            heads = next(reader, [])
            command = "lte curve" if "setting" in heads else "lte bench"
            if missing := ({"setting", *POINT} if command == "lte curve" else {*WORDS, *NUMBERS}) - set(heads):
                raise UserError(f"{file} is not a CSV file of {command}: it has no column {', '.join(sorted(missing))}")
            for cells in reader:
                number = reader.line_num
                if not cells:
                    continue
                if len(cells) != len(heads):
                    raise UserError(
                        f"{file}, line {number}: {len(cells)} fields ({','.join(cells)[:80]}), but {len(heads)} "
                        f"columns; is it cut off? Run {command} again, or remove the line"
                    )
                row = dict(zip(heads, cells, strict=True))
                rows.append(
                    {"file": str(file)}
                    | {key: _value(file, number, key, row[key], command == "lte curve") for key in row}
                )
    except csv.Error as error:
        raise UserError(f"{file}, after line {number}: {error}; is it a CSV file of lte bench?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the benchmark {file}: {error}") from error
    if not rows:
        raise UserError(f"{file} has columns, but no rows; run {command} again, or leave it out of --bench")
    return rows


def _value(file: Path, line: int, key: str, text: str, is_point: bool) -> Any:
    if key in WORDS and not text.strip():
        raise UserError(f"{file}, line {line}: {key} is empty; run lte bench again, or remove the line")
    limits: dict[str, tuple[float, float]] = {key: (-ANY, ANY)} | POINT if is_point else dict(NUMBERS)
    limits |= {} if is_point or not text else MORE_NUMBERS
    if key not in limits or key == "setting":
        return text
    low, high = limits[key]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        least = {LEAST: " above 0", -ANY: ""}.get(
            low, f" of at least {low}" if math.isinf(high) else f" from {low} to {high}"
        )
        raise UserError(f"{file}, line {line}: {key} is {text!r}; it must be a finite number{least}")
    return value


def metric_of(point: Mapping[str, Any]) -> str:
    """Returns the name of the metric in a point of ``lte curve``."""
    return next(key for key in point if key not in (*POINT, "setting", "file"))


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups the rows by picture, in the order of files, names and numbers."""
    by_picture: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_picture.setdefault(tuple(row.get(key, "") for key in SAME), []).append(row)
    files = list(dict.fromkeys(row["file"] for row in rows))

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        # a number does not compare with a missing value
        return files.index(key[0]), *((value, "") if isinstance(value, float) else (0.0, value) for value in key[1:])

    return [by_picture[key] for key in sorted(by_picture, key=order)]


def title(group: Sequence[dict[str, Any]], several_files: bool) -> str:
    """Returns the title of a group: what its rows have in common."""
    row = group[0]
    words = [row["file"]] if several_files else []
    words += [row[key] for key in ("shape", "scope", "phase", "device", "dtype") if row.get(key)]
    for key in ("tokens", "threads"):
        if row.get(key):
            words.append(f"{row[key]:g}\N{NO-BREAK SPACE}{key if row[key] != 1 else key[:-1]}")
    return ", ".join(words)

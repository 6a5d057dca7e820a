"""Reads what ``lte bench --against`` wrote, and shows quality against tokens per second."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.figure import Figure

from lte_lightning.bench.rates import Rate, plot_rates
from lte_lightning.errors import UserError
from lte_lightning.report.pictures import Draw
from lte_lightning.report.tables import Table

SHOWN = (
    "engine",
    "dtype",
    "way",
    "sparsity",
    "tokens_per_second",
    "least",
    "most",
    "ratio",
    "quality",
    "threads",
    "load",
)
TEXT = (
    "Tokens per second of torch's dense model, of ours, and of the dense model in other engines: the same inputs, "
    "threads and number of tokens, by turns. Medians over rounds; ratio is that to the first row."
)


def is_rates(file: Path) -> bool:
    """Says whether a CSV file is of whole models beside other engines."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return {"engine", "tokens_per_second"} <= {*lines.readline().strip().split(",")}
    except (OSError, UnicodeDecodeError):
        return False  # what is wrong with it is said by `read_bench`


def read_rates(file: Path) -> list[tuple[str, Rate]]:
    """Returns the rows, each with the file's name.

    Raises:
        UserError: If a column is missing, or a value in it cannot be.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the benchmark {file}: {error}") from error
    found = []
    for number, row in enumerate(rows, 2):
        values = {}
        for field in fields(Rate):
            text = row.get(field.name)
            try:
                values[field.name] = field.type(text)  # type: ignore[operator]  # str, int or float
                if text is None or (field.name == "tokens_per_second" and not 0 < values[field.name] < math.inf):
                    raise ValueError
            except (TypeError, ValueError):
                raise UserError(
                    f"{file}, line {number}: {field.name} is {text!r}; run lte bench again, or remove the line"
                ) from None
        found.append((str(file), Rate(**values)))
    if not found:
        raise UserError(f"{file} has columns, but no figures; run lte bench again, or leave it out of --bench")
    return found


def groups(rates: Sequence[tuple[str, Rate]]) -> dict[str, list[Rate]]:
    """Returns the rows that belong in one picture, by its title."""
    found: dict[str, list[Rate]] = {}
    for file, rate in rates:
        what = f"{rate.new_tokens} new tokens" if rate.new_tokens else f"{rate.sequences} x {rate.length} tokens"
        found.setdefault(f"{rate.model}, {what}, {rate.threads} threads ({Path(file).name})", []).append(rate)
    return found


def picture(group: Sequence[Rate]) -> Draw:
    """Draws a group."""

    def draw(figure: Figure) -> str:
        plot_rates(figure.add_subplot(), group)
        return "; ".join(f"{rate.name} {rate.tokens_per_second:.4g} tokens per second" for rate in group)

    return draw


def claim(group: Sequence[Rate]) -> str:
    """Says which is the fastest."""
    fastest = max(group, key=lambda rate: rate.tokens_per_second)
    return f"Fastest: {fastest.name}, {fastest.tokens_per_second:.4g} tokens per second."


def table(group: Sequence[Rate], caption: str, name: str) -> Table:
    """Returns a group's rows."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{value:.4g}"
        return str(value or "–")

    return Table(list(SHOWN), [[cell(asdict(rate)[name]) for name in SHOWN] for rate in group], caption, name)

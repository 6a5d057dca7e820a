"""Checks of options and rows; each error names the value and the place."""

from collections.abc import Iterable, Sequence

from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lte_lightning.data.packaged import DataError
from lte_lightning.errors import meant


def require_at_least(**limits: tuple[float | None, float]) -> None:
    """Checks named values against their lower limits; None passes."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise DataError(f"{name} is {value}, but must be at least {least}")


def require_columns(rows: Dataset, columns: Sequence[str], where: str, hint: str = "") -> None:
    """Checks that the columns are there, and names the nearest ones if not."""
    for column in columns:
        if column not in rows.column_names:
            near = meant(column, rows.column_names)
            raise DataError(f"{where} has no column {column!r}{near}; it has {', '.join(rows.column_names)}{hint}")


def rows_of(role: str) -> str:
    """Returns what messages call the rows of a role: ``training rows`` for ``train``."""
    names = {"train": "training rows", "predict": "rows to predict", "predict prompts": "prompts to predict"}
    return names.get(role, role if role.endswith("prompts") else f"{role} rows")


def rename_only_column(rows: Dataset, columns: Sequence[str], where: str) -> Dataset:
    """Renames the column if there is only one and only one is requested. Otherwise the rows stay as they are."""
    if len(rows.column_names) != 1 or len(columns) != 1 or rows.column_names == list(columns):
        return rows
    rank_zero_info(f"{where}: its only column, {rows.column_names[0]}, is read as {columns[0]}")
    return rows.rename_column(rows.column_names[0], columns[0])


def require_text(rows: Dataset, columns: Sequence[str], where: str, optional: Sequence[str] = ()) -> None:
    """Checks that every value of the columns is a string; those of optional ones may be missing."""
    for column in columns:
        values = rows[column][:]
        wrong = [
            row
            for row, value in enumerate(values)
            if not (isinstance(value, str) or (value is None and column in optional))
        ]
        if wrong:
            raise DataError(
                f"{where}, row {wrong[0]} (from 0): {column} is {values[wrong[0]]!r:.200}, not text ({len(wrong)} of "
                f"{len(values)} rows have none): convert the column to text, or remove the rows"
            )


def report_blank(blank: int, rows: int, part: str, where: str) -> None:
    """Warns of rows in which a part is blank.

    Args:
        blank: How many there are.
        rows: How many rows there are in all.
        part: A column, or what it has.
        where: Name of the split.

    Raises:
        DataError: If it is so in all rows.
    """
    if blank and blank == rows:
        raise DataError(f"{where}: {part} is empty in all rows ({rows}): fill it, or name another column")
    if blank:
        rank_zero_warn(f"{where}: {part} is empty in {blank} of {rows} rows, which are read as they are")


def count_blank(texts: Iterable[str]) -> int:
    """Returns how many texts are blank."""
    return sum(not text.strip() for text in texts)

"""Checks of options and rows; each error names the value and the place."""

from collections.abc import Sequence

from datasets import Dataset

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


def require_text(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Checks that every value of the columns is a string."""
    for column in columns:
        for row, text in enumerate(rows[column][:]):
            if not isinstance(text, str):
                raise DataError(f"{where}, row {row} (from 0): {column} is {text!r}, not text")

"""Files of one JSON object per row: predictions and samples."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lte_lightning.files import write_text


def write_rows(file: Path, rows: Iterable[dict[str, Any]], append: bool = False) -> None:
    """Writes rows as JSON lines, whole or not at all.

    Args:
        file: Target file.
        rows: The rows.
        append: Keep the file's present rows.
    """
    before = file.read_text("utf-8") if append and file.exists() else ""
    write_text(file, before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prediction_rows(batches: Iterable[list[dict[str, Any]] | torch.Tensor]) -> list[dict[str, Any]]:
    """Returns the rows of predictions in the order of the data.

    Args:
        batches: The returned value of each prediction step: rows, which may give their position as ``row``, or a
            tensor with one prediction per example.
    """
    rows = [
        row
        for batch in batches
        for row in (batch if isinstance(batch, list) else [{"prediction": value} for value in batch.tolist()])
    ]
    rows.sort(key=lambda row: row.get("row", 0))  # stable: only predictions with a row number move
    return [{"row": i} | row for i, row in enumerate(rows)]

"""``lte curve``: quality, FLOPs and tokens per second of a calibrated model over its sparsity."""

import csv
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: If an argument is wrong, or the model was not calibrated; nothing is written then.
    """
    call(curve, "lte curve", args, positional="folder")


def curve(
    folder: str,
    sparsity: str | None = None,
    data: str | None = None,
    out: Path = Path("curve.png"),
    rows: int = 1,
    device: str = "auto",
) -> None:
    """Draws a calibrated model's quality, FLOPs per token and tokens per second over its sparsity.

    lte curve RUN --out curve.png

    A table beside the picture (curve.csv) holds the same values, and those of the dense model and of the trained
    threshold. Quality is measured on all validation rows. Speed is that of forward passes; for a language model, of
    decoding steps. All settings take turns.

    Args:
        folder: A saved LTE model that lte calibrate has given a table, or its run.
        sparsity: Shares of the FFN neurons that shall not run, with commas between. By default those of the table.
        data: A configuration (.yaml) with model and data, whose validation rows are taken, or a text file or folder for
            a language model. By default the run's own config.yaml.
        out: The picture, .png or .svg.
        rows: Batch size of each timed call.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.

    Raises:
        UserError: If an option has an invalid value, or the model was not calibrated.
    """
    from lte_lightning.bench.machine import find_device
    from lte_lightning.cli.calibrate import read_sparsities
    from lte_lightning.cli.curve_points import draw, qualities, speeds
    from lte_lightning.cli.rows import load_rows
    from lte_lightning.core.model.thresholds import kept_table
    from lte_lightning.files import require_place, whole_file

    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out is {out}; name a picture, .png or .svg")
    require_place(out)
    if rows < 1:
        raise UserError(f"--rows is {rows}; it must be at least 1")
    requested = None if sparsity is None else read_sparsities(sparsity)
    loaded = load_rows(folder, data, find_device(device))
    table = kept_table(loaded.module.net)
    if table is None:
        raise UserError(f"{folder} was not calibrated, so it has one sparsity; run lte calibrate {folder} first")
    sparsities = requested or [setting.sparsity for setting in table.settings]
    for value in sparsities:
        table.at(value)  # refuses what lies outside
    points = qualities(loaded, sparsities)
    speed = speeds(loaded, sparsities, rows)
    for point in points:
        point["tokens_per_second"] = speed[point["setting"]]
    with whole_file(out.with_suffix(".csv"), newline="") as file:
        writer = csv.DictWriter(file, list(points[0]))
        writer.writeheader()
        writer.writerows(points)
    draw(points, out)
    _show(points)
    print(f"wrote {out} and {out.with_suffix('.csv')}")


def _show(points: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in points[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for point in points:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in point.values()))
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table)

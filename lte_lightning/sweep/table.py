"""What a sweep found: one row per fit, and one per setting over the seeds."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte_lightning.core.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point

RUN_LAYOUT = 1  # of run.json; a run that names none was written before there were any
LOWER_IS_BETTER = ("perplexity", "loss")
FIGURES = (
    "dense",
    "soft",
    "hard_before",
    "hard",
    "floor",
    "span_kept",
    "sparsity",
    "flops_per_token",
    "bound",
    "speedup",
)


def read_run_file(run: Path) -> dict[str, Any]:
    """Returns a run's ``run.json``.

    Raises:
        UserError: If it is damaged, or the run folder is of another version.
    """
    try:
        about = json.loads((run / "run.json").read_text())
        layout = about.get("layout", RUN_LAYOUT)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{run / 'run.json'} is damaged: {error!r}; leave this run out") from error
    if layout != RUN_LAYOUT:
        raise UserError(
            f"run folder {run} has layout {layout!r}, this lte-lightning reads {RUN_LAYOUT}; use the version that "
            "wrote it, or leave this run out"
        )
    return about


def read_results(run: Path) -> dict[str, Any]:
    """Returns a run's ``results.json``, with ``value``, the hardest of its figures, and ``span_kept``.

    Raises:
        UserError: If the file is missing, damaged, or written by another version.
    """
    file = run / "results.json"
    try:
        results = json.loads(file.read_text())
        results["value"] = next(
            (results[view] for view in ("hard", "hard_before", "soft", "dense") if results[view] is not None), None
        )
        dense, hard, floor = results["dense"], results["hard"], results.get("floor")
        _ = results["task"], results["metric"], results["sparsity"], results["dense_flops_per_token"], results["seed"]
    except OSError as error:
        raise UserError(f"{run} has no results.json: its fit was not finished, or it is no run folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged, or was written by another version of lte-lightning: {error!r} is not there; use the "
            "version that wrote it, or leave this run out"
        ) from error
    results["span_kept"] = None
    if dense is not None and hard is not None and floor is not None and better(results["metric"], dense, floor):
        results["span_kept"] = (hard - floor) / (dense - floor)
    return results


def better(metric: str, one: float, other: float) -> bool:
    """Says whether a figure of a metric is better than another."""
    return one < other if metric.startswith(LOWER_IS_BETTER) else one > other


def describe(results: dict[str, Any]) -> str:
    """Says the figures of a fit in a few words."""
    words = [f"{view} {results[view]:.4f}" for view in ("dense", "hard") if results[view] is not None]
    if results["hard"] is None and results["hard_before"] is not None:
        words.append(f"hard_before {results['hard_before']:.4f}")
    if results["sparsity"] is not None:
        words.append(f"sparsity {100 * results['sparsity']:.1f} %")
    return f"{results['metric']}: {', '.join(words)}"


def write_tables(folder: SweepFolder, points: Sequence[Point]) -> list[Path]:
    """Writes ``table.csv``, a row for each fit, and ``table.md``, means and deviations over the seeds."""
    attempts, rows = folder.attempts(), []
    keys = list(dict.fromkeys(key for point in points for key in point.parameters))
    for point in points:
        row: dict[str, Any] = {"name": point.name, "role": point.role, "variant": point.variant or ""}
        row |= {key: point.parameters.get(key, "") for key in keys} | {"seed": point.seed}
        run, known = folder.finished(point.name, attempts), folder.status(point.name)
        row["status"] = "done" if run else known.get("status", "missing")
        if run:
            results = read_results(run)
            row |= {"task": results["task"], "metric": results["metric"]}
            row |= {key: results.get(key) for key in FIGURES}
        row |= {"seconds": known.get("seconds"), "run": run.name if run else None}
        rows.append(row)
    names = ["name", "role", "variant", *keys, "seed", "status", "task", "metric", *FIGURES, "seconds", "run"]
    files = [folder.path / "table.csv", folder.path / "table.md"]
    with files[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    files[1].write_text(_markdown(rows, keys))
    return files


def _markdown(rows: list[dict[str, Any]], keys: list[str]) -> str:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            label = row["variant"] or "fit" if row["role"] == "point" else row["role"]
            groups.setdefault((row["task"], row["metric"], label, *(str(row[key]) for key in keys)), []).append(row)
    heads = ["task", "metric", "variant", *keys, "seeds", "dense", "hard", "sparsity", "floor", "span kept", "FLOPs"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for identity, members in groups.items():
        cells = [*identity, ", ".join(str(row["seed"]) for row in members)]
        cells += [mean_text([row[key] for row in members]) for key in ("dense", "hard")]
        cells.append(mean_text([row["sparsity"] for row in members], 100, " %", 1))
        cells.append(mean_text([row["floor"] for row in members]))
        cells.append(mean_text([row["span_kept"] for row in members], 100, " %", 0))
        cells.append(mean_text([row["flops_per_token"] for row in members], 2.0**-30, " G"))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    lost = [row["name"] for row in rows if row["status"] != "done"]
    tail = f"\n{len(lost)} of {len(rows)} fits are not done: {', '.join(lost)}\n" if lost else ""
    return "\n".join(lines) + "\n" + tail


def mean_text(values: Sequence[float | None], scale: float = 1.0, unit: str = "", digits: int = 4) -> str:
    """Writes mean and standard deviation of the figures that there are; a dash if there are none."""
    found = [scale * value for value in values if value is not None and value != ""]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{spread}{unit}"

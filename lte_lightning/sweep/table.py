"""Tables of a sweep: one row per fit, and one per setting over the seeds."""

import csv
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lte_lightning.files import markdown_table, whole_file, write_text
from lte_lightning.results import FILE, Results, read_results
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.paired import Fits, comparisons
from lte_lightning.sweep.points import NEUTRAL, Point

# Options that are no choice of a fit's: its seed, its place, and what is shown of it
NO_CHOICE = ("run.", "seed_everything", "ckpt_path", *NEUTRAL)
VALUES = (
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


def newest(run: Path) -> tuple[int, int, str]:
    """A key to sort run folders with results by, the newest last."""
    return (run / FILE).stat().st_mtime_ns, (run / "run.json").stat().st_mtime_ns, run.name


def write_tables(folder: SweepFolder, points: Sequence[Point]) -> list[Path]:
    """Writes ``table.csv``, a row for each fit, and ``table.md``, means and deviations over the seeds.

    Beside them ``differences.md``, if there are variants to compare: the first variant's values minus the others',
    paired. Of several finished runs of a fit the newest counts, as in a report. An undefined value is ``nan``.
    """
    attempts, rows = folder.attempts(), []
    results_of: dict[str, Results] = {}
    keys = list(dict.fromkeys(key for point in points for key in point.parameters))
    labels = _labels(folder, points)
    runs = {point.name: _newest(attempts.get(point.name, [])) for point in points}
    for point in points:
        row: dict[str, Any] = {"name": point.name, "role": point.role, "variant": point.variant or ""}
        row |= {key: point.parameters.get(key, "") for key in keys} | {"seed": point.seed}
        run, record = runs[point.name], folder.record(point.name)
        row["status"] = "done" if run else (record and record.status) or "missing"
        if run:
            results = results_of[point.name] = read_results(run)
            if results.floor is None and point.floor and (beside := runs.get(point.floor)):
                results = replace(results, floor=read_results(beside).floor)
            row |= {key: getattr(results, key) for key in ("task", "metric", *VALUES)}
            if results.hard is None and results.expert_stage_ran:
                row["hard"] = math.nan
        row |= {"seconds": record and record.seconds, "run": run.name if run else None}
        rows.append(row)
    names = ["name", "role", "variant", *keys, "seed", "status", "task", "metric", *VALUES, "seconds", "run"]
    files = [folder.path / "table.csv", folder.path / "table.md"]
    with whole_file(files[0], newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    rows = [row | {"label": labels[row["name"]]} for row in rows]
    write_text(files[1], _markdown(rows, keys))
    if differences := _differences(rows, keys, results_of):
        files.append(folder.path / "differences.md")
        write_text(files[2], markdown_table(differences[0], differences[1:]))
    return files


def _newest(attempts: Sequence[Path]) -> Path | None:
    finished = [run for run in attempts if (run / FILE).exists()]
    return max(finished, key=newest, default=None)


def _labels(folder: SweepFolder, points: Sequence[Point]) -> dict[str, str]:
    """Returns each fit's label over the seeds. Labels of several starts or floors name their differences."""
    stored = {name: record.point for name, record in folder.records().items() if record.point.identity}
    all_points = stored | {point.name: point for point in points if point.identity}
    labels = {point.name: point.variant or "fit" for point in points}
    for role in ("start", "floor"):
        mine = [point for point in points if point.role == role]
        choices_of = {
            point.name: _choices(all_points[point.name], all_points) for point in mine if point.name in all_points
        }
        names = sorted({key for choices in choices_of.values() for key in choices})
        names = [key for key in names if len({choices.get(key) for choices in choices_of.values()}) > 1]
        several = max(Counter(point.seed for point in mine).values(), default=0) > 1
        for name in (point.name for point in mine):
            own_choices = choices_of.get(name)
            words = dict.fromkeys(
                f"{key.split('.')[-1]} {(own_choices or {}).get(key, 'as configured')}" for key in names
            )
            if own_choices is None and several:  # an earlier version did not keep what tells it from the others
                words = {name: None}
            labels[name] = f"{role} ({', '.join(words)})" if words else role
    return labels


def _choices(point: Point, points: dict[str, Point]) -> dict[str, str]:
    """Returns what distinguishes starts or floors: their configs and options, and those of their own start."""
    choices = {"configs": " + ".join(Path(path).stem for path in point.configs)}
    choices |= point.options
    start = _choices(points[point.start], points) if point.start in points else {}
    return choices | {f"start.{key}": value for key, value in start.items()}


def _markdown(rows: list[dict[str, Any]], keys: list[str]) -> str:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            group = (row["task"], row["metric"], row["label"], *(str(row[key]) for key in keys))
            groups.setdefault(group, []).append(row)
    heads = ["task", "metric", "variant", *keys, "seeds", "dense", "hard", "sparsity", "floor"]
    heads += ["span kept, of the dense start", "FLOPs", "hard before"]
    table = []
    for group, members in groups.items():
        cells = [*group, ", ".join(str(row["seed"]) for row in members)]
        cells += [mean_text([row[key] for row in members]) for key in ("dense", "hard")]
        cells.append(mean_text([row["sparsity"] for row in members], 100, " %", 1))
        cells.append(mean_text([row["floor"] for row in members]))
        cells.append(span_text([row["span_kept"] for row in members]))
        cells.append(mean_text([row["flops_per_token"] for row in members], 2.0**-30, " G"))
        cells.append(mean_text([row["hard_before"] for row in members]))
        table.append(cells)
    lost = [row["name"] for row in rows if row["status"] != "done"]
    tail = f"\n{len(lost)} of {len(rows)} fits are not done: {', '.join(lost)}\n" if lost else ""
    return markdown_table(heads, table) + tail


def _differences(rows: list[dict[str, Any]], keys: list[str], results_of: dict[str, Results]) -> list[list[str]]:
    """Returns heads and rows of the comparisons; nothing if there are none."""
    fits: dict[tuple[str, str], dict[tuple[str, str], dict[int, Results]]] = {}
    for row in rows:
        if row["status"] == "done" and row["role"] == "point":
            setting = ", ".join(f"{key.split('.')[-1]} {row[key]}" for key in keys if row[key] not in ("", None))
            group = fits.setdefault((row["task"], row["metric"]), {}).setdefault((row["label"], setting), {})
            group[row["seed"]] = results_of[row["name"]]
    table = [["task", "metric", "value of", "minus that of", "seeds", "difference, 95 % interval"]]
    for experiment, groups in fits.items():
        settings = [Fits(*names, by_seed) for names, by_seed in groups.items()]
        for ours, theirs, difference in comparisons(settings):
            table.append([*experiment, ours.called, theirs.called, str(difference.seeds), difference.text()])
    return table if len(table) > 1 else []


def mean_text(values: Sequence[float | None], scale: float = 1.0, unit: str = "", digits: int = 4) -> str:
    """Writes mean and standard deviation of the values; a dash without any.

    An undefined value is NaN and makes the mean undefined, instead of being left out.
    """
    scaled = [scale * value for value in values if value is not None]
    if not scaled:
        return "–"
    if undefined := sum(map(math.isnan, scaled)):
        return "undefined" if undefined == len(scaled) else f"undefined in {undefined} of {len(scaled)}"
    spread = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.fmean(scaled):.{digits}f}{spread}{unit}"


def span_text(shares: Sequence[float | None]) -> str:
    """Returns the kept share of the span from floor to dense as text, with the number of seeds if some have none."""
    usable = sum(share is not None for share in shares)
    few = f" ({usable} of {len(shares)} seeds)" if 0 < usable < len(shares) else ""
    return mean_text(shares, 100, " %", 0) + few

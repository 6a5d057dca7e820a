"""The results of a fit, for machines (``results.json``) and for people (a table)."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lte_lightning.callbacks.stages import StageSchedule
from lte_lightning.core.accounting.cost import GFLOP
from lte_lightning.errors import UserError
from lte_lightning.figures import span_kept
from lte_lightning.recording.machine import code, machine
from lte_lightning.tasks.evaluation import VIEW_MODES


def make_results(trainer: Trainer, module: LightningModule, floor: float | None = None) -> dict[str, Any]:
    """Collects what a fit has found.

    Args:
        trainer: With a `StageSchedule` among its callbacks.
        module: After the fit, with the weights that count.
        floor: The task's floor, if it was measured elsewhere.

    Returns:
        ``dense``, ``soft``, ``hard_before`` and ``hard`` are values of ``metric`` on the validation rows, None where
        the stage was not run; ``sparsity``, FLOPs and bytes are those of the last of them, ``sparsity_before`` is that
        of ``hard_before``, ``union_sparsity`` is by batch size; ``floor`` is there if known.
    """
    metric, measured = module.metric_name, module.measured
    schedule = next(callback for callback in trainer.callbacks if isinstance(callback, StageSchedule))
    hardest = measured.get("hard") or measured.get("hard_before") or {}
    per_layer = hardest.get("sparsity_per_layer")
    results: dict[str, Any] = {
        "task": getattr(trainer.datamodule, "task", type(module).__name__.lower()),
        "data": getattr(trainer.datamodule, "source", None),
        "metric": metric,
        **{view: measured.get(view, {}).get(metric) for view in ("dense", "soft", "hard_before", "hard")},
        "sparsity": hardest.get("sparsity"),
        "sparsity_before": measured.get("hard_before", {}).get("sparsity"),
        "sparsity_per_layer": per_layer,
        "union_sparsity": hardest.get("union_sparsity"),
        **module.cost(per_layer),
        "grouping": measured.get("grouping"),
        "seconds_per_stage": {stage: round(seconds, 1) for stage, seconds in schedule.seconds.items()},
        "seed": schedule.seed,
        "versions": versions(trainer),
    }
    if module.net.lte_config.selector == "none" and results["hard"] is not None:
        floor = results["hard"]
    if floor is not None:
        results["floor"] = floor
    for key in further_figures(module):
        if values := {view: found[key] for view, found in measured.items() if key in found}:
            results[key] = values
    for key, name in (("skipped_rows", "skipped"), ("cut_answers", "cut_answers")):
        if counts := getattr(trainer.datamodule, name, None):
            results[key] = dict(counts)
    return results


def further_figures(module: LightningModule) -> list[str]:
    """Returns what was measured in each view besides the metric and the sparsity: other sets, other metrics."""
    known = {module.metric_name, "sparsity"}
    views = [module.measured.get(view, {}) for view in VIEW_MODES]
    names = [key for found in views for key, value in found.items() if isinstance(value, float | None)]
    return [key for key in dict.fromkeys(names) if key not in known]


def versions(trainer: Trainer) -> dict[str, Any]:
    """Returns what a figure depends on besides the configuration."""
    packages = ("lte-lightning", "torch", "lightning", "transformers", "datasets")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **code(),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "machine": platform.machine(),
        **machine(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
    }


def read_floor(path: str) -> dict[str, Any]:
    """Returns ``floor`` and ``task`` of a ``results.json``.

    Raises:
        UserError: If the file is missing, damaged, or has none.
    """
    try:
        results = json.loads(Path(path).read_text())
        return {"floor": float(results["floor"]), "task": results["task"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} gives no floor ({error!r}); name the results.json of a fit with model.lte.selector none"
        ) from error


def results_table(results: dict[str, Any]) -> Table:
    """Lays the results out for reading."""
    title = f"{results['task']}: {results['metric']} on the validation rows"
    table = Table(title=title, title_justify="left")
    for column, justify in (
        ("", "left"),
        (results["metric"], "right"),
        ("sparsity", "right"),
        ("GFLOPs/token", "right"),
        ("MB/token", "right"),
        ("bound", "right"),
    ):
        table.add_column(column, justify=justify)
    dense, sparse = results["dense_flops_per_token"] / GFLOP, results["flops_per_token"] / GFLOP
    moved = {key: f"{results[key] / 1e6:.3f}" for key in ("dense_bytes_per_token", "bytes_per_token")}
    last = "hard" if results["hard"] is not None else "hard_before"
    rows = {
        "dense": "dense",
        "soft": "soft routing",
        "hard_before": "hard, before adaptation",
        "hard": "hard, after adaptation",
    }
    for view, label in rows.items():
        if results[view] is not None:
            figures = ("0.0 %", f"{dense:.4f}", moved["dense_bytes_per_token"], "1.00x") if view == "dense" else ()
            if view == last:
                share, bound = f"{100 * results['sparsity']:.1f} %", f"{results['bound']:.2f}x"
                figures = (share, f"{sparse:.4f}", moved["bytes_per_token"], bound)
            elif view == "hard_before" and results["sparsity_before"] is not None:
                figures = (f"{100 * results['sparsity_before']:.1f} %",)
            table.add_row(label, f"{results[view]:.4f}", *figures)
    if "floor" in results:
        table.add_row("floor: no expert at all", f"{results['floor']:.4f}", "100.0 %")
    notes = [f"Data: {results['data']}."] if results.get("data") else []
    if results["sparsity"] is not None:
        notes.append(f"FLOPs saved: {100 * (1 - sparse / dense):.1f} % (GFLOPs are 2^30, as in the paper).")
    if (kept := span_kept(results)) is not None:
        notes.append(f"Of the span from the floor to the dense start {100 * kept:.0f} % is kept.")
    if "speedup" in results:
        of = results["latency_of"]
        notes.append(
            f"Measured: {results['speedup']:.2f}x as fast as dense, {results['latency_ms']:.2f} ms per {of['call']} of "
            f"{of['rows']} rows ({of['dtype']}, {of['device']}, {of['threads']} threads, load {of['load']})."
        )
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds_per_stage"].items())
    table.caption = "\n".join([*notes, f"Time: {times}."])
    table.caption_justify = "left"
    return table


def test_table(task: str, found: dict[str, Any]) -> Table:
    """Lays a test's figures out for reading; those of each layer, subject and score are in its file."""
    table = Table(title=f"{task}: test", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    forms = {
        "sparsity": ("FFN sparsity", "{:.1%}", 1.0),
        "flops_per_token": ("GFLOPs/token (2^30)", "{:.4f}", GFLOP),
        "bytes_per_token": ("MB/token", "{:.3f}", 1e6),
        "bound": ("speed-up bound", "{:.2f}x", 1.0),
    }
    for key, value in found.items():
        if key.startswith("dense_"):
            continue
        if key in forms:
            label, form, unit = forms[key]
            table.add_row(label, form.format(value / unit))
        elif isinstance(value, int | float | None):
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
        elif key in ("skipped_rows", "cut_answers"):
            for what, count in value.items():
                table.add_row(f"{key}: {what}", str(count))
    return table


def show(table: Table) -> None:
    """Prints a table on the terminal, or at a fixed width into a file."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    console.print(table)

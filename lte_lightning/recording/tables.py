"""The results of a fit and of a test: collected from the module, and laid out for people."""

import logging
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lte_lightning.callbacks.stages import StageSchedule
from lte_lightning.choices import options_of_start
from lte_lightning.core.accounting.cost import GFLOP
from lte_lightning.core.model.card import public_name
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import lte_config
from lte_lightning.errors import UserError, meant_path
from lte_lightning.recording.machine import code, machine
from lte_lightning.results import Evaluation, Results, read
from lte_lightning.selection import selector_class
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.evaluation import VIEW_MODES

logger = logging.getLogger("lte_lightning")
LABELS = {
    "dense": "dense",
    "soft": "soft routing",
    "hard_before": "hard, before adaptation",
    "hard": "hard, after adaptation",
}
CORRELATIONS = ("pearson", "spearman")
NEAR = 0.01
"""A target counts as reached within one point of sparsity."""


def make_results(
    trainer: Trainer, module: LteModule, floor: float | None = None, options: dict[str, Any] | None = None
) -> Results:
    """Collects the results of a fit.

    Args:
        trainer: A trainer with a `StageSchedule` among its callbacks.
        module: The module after the fit, with the final weights.
        floor: The task's floor, if another run measured it.
        options: The fit's options by name, if they are known.
    """
    data: Any = getattr(trainer, "datamodule", None)
    measured, callbacks = module.measured, getattr(trainer, "callbacks", [])
    schedule = next(callback for callback in callbacks if isinstance(callback, StageSchedule))
    hardest = measured.get("hard") or measured.get("hard_before") or {}
    views = {view: measured.get(view, {}).get(module.metric_name) for view in VIEW_MODES}
    if lte_config(module.net).selector == "none" and views["hard"] is not None:
        floor = views["hard"]
    fields: dict[str, Any] = {
        "task": getattr(data, "task", type(module).__name__.lower()),
        "data": getattr(data, "source", None),
        "title": getattr(data, "title", None),
        "metric": module.metric_name,
        **views,
        **{key: hardest.get(key) for key in ("sparsity", "sparsity_per_layer", "union_sparsity", "draws")},
        "sparsity_before": measured.get("hard_before", {}).get("sparsity"),
        "target_sparsity": lte_config(module.net).target_sparsity if hardest else None,
        **module.cost(hardest.get("sparsity_per_layer")),
        "grouping": measured.get("grouping"),
        "seconds_per_stage": {stage: round(seconds, 1) for stage, seconds in schedule.seconds.items()},
        "seed": schedule.seed,
        "versions": versions(trainer),
        "floor": floor,
        "options": options and options | options_of_start(module.hparams["init_from"]),
    }
    for key, name in (("skipped_rows", "skipped"), ("cut_answers", "cut_answers")):
        fields[key] = dict(getattr(data, name, None) or {}) or None
    for key in further_metrics(module):
        fields[key] = {view: values[key] for view, values in measured.items() if key in values}
    return Results.of(fields)


def further_metrics(module: LteModule) -> list[str]:
    """Returns the values of each view besides the metric and the sparsity: other sets, other metrics."""
    known = {module.metric_name, "sparsity"}
    views = [module.measured.get(view, {}) for view in VIEW_MODES]
    names = [key for metrics in views for key, value in metrics.items() if isinstance(value, float | None)]
    return [key for key in dict.fromkeys(names) if key not in known]


def versions(trainer: Trainer) -> dict[str, Any]:
    """Returns the versions and the machine that a result depends on besides the configuration."""
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


def read_floor(path: str) -> Results:
    """Returns a ``results.json`` that has a ``floor``.

    Raises:
        UserError: If the file is missing, damaged, or has none.
    """
    way_out = "name the results.json of a fit with model.lte.selector none"
    try:
        results = read(Results, Path(path), way_out)
    except OSError as error:
        cause = f"{error.strerror or error}{meant_path(path)}"
        raise UserError(f"{path} gives no floor: {cause}; {way_out}") from error
    if results.floor is None:
        raise UserError(f"{path} gives no floor, its fit had none; {way_out}")
    return results


def facts_for_card(results: Results, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts of the fit for a model card. They name no paths or machines, so that they can be published.

    Args:
        results: The fit's results.
        options: The module's options.
    """
    published = ("task", "metric", *VIEW_MODES, "floor", "sparsity", "sparsity_before", "target_sparsity")
    published += ("sparsity_per_layer", "seed", "flops_per_token", "dense_flops_per_token", "seconds_per_stage")
    content = results.content()
    packages = ("python", "lte-lightning", "torch", "transformers", "commit", "code", "precision")
    versions = {key: results.versions[key] for key in packages if results.versions.get(key) is not None}
    recipe = (
        *("router_training", "router_start", "detach_router", "distillation", "sparsity_range", "efficiency_weight"),
        *("separability_weight", "balance_weight", "freeze_routers", "activation", "layers"),
    )
    return {
        "results": {key: content[key] for key in published if content.get(key) is not None}
        | {"data": public_name(results.data), "versions": versions},
        "recipe": {key: options[key] for key in recipe if options.get(key) is not None},
    }


def warn_of_missed_target(results: Results, config: LteConfig) -> str | None:
    """Warns, with advice, if a fit ended further than `NEAR` from its target sparsity.

    Args:
        results: The fit's results.
        config: The model's LTE options.

    Returns:
        The warning; None if the fit reached the target, or there is no target.
    """
    wanted, reached = results.target_sparsity, results.sparsity
    if wanted is None or reached is None or abs(reached - wanted) <= NEAR:
        return None
    missed = f"Target missed: {100 * wanted:.1f} % sparsity was asked for, {100 * reached:.1f} % reached."
    kind = selector_class(config.selector)
    if kind.graded and not kind.scales:
        missed += f" `lte calibrate RUN --sparsity {wanted:g}` moves the threshold there, without training."
    else:
        missed += f" Selector {config.selector!r} has no threshold to move: fit again with another target_sparsity."
    logger.warning(missed)
    return missed


def warn_of_constant_answers(module: LteModule, views: Iterable[str] = VIEW_MODES) -> str | None:
    """Warns if a view gives one answer to every row: one class although the labels differ, or no defined correlation.

    Args:
        module: The module after its measurements.
        views: The views to look at.

    Returns:
        The warning; None if each view tells rows apart.
    """
    said = []
    for view in views:
        values, label = module.measured.get(view, {}), LABELS.get(view, view)
        matrix = values.get("confusion_matrix") or {}
        classes = {name for row in matrix.values() for name in row}
        if len(matrix) > 1 and len(classes) == 1:
            said.append(f"{label}: every row was taken for class {classes.pop()!r}.")
        elif module.metric_name in CORRELATIONS and values.get(module.metric_name, 0.0) is None:
            said.append(
                f"{label}: {module.metric_name} is not defined, because all predictions or all labels are equal."
            )
    for warning in said:
        logger.warning(warning)
    return "\n".join(said) or None


def results_table(results: Results, *remarks: str | None) -> Table:
    """Lays the results out for reading, under the data's title or the task's name, with remarks below the table."""
    title = f"{results.title or results.task}: {results.metric} on the validation rows"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in (results.metric, "sparsity", "GFLOPs/token", "MB/token", "bound"):
        table.add_column(column, justify="right")
    dense, sparse = results.dense_flops_per_token / GFLOP, results.flops_per_token / GFLOP
    last = "hard" if results.hard is not None else "hard_before"
    for view, label in LABELS.items():
        value = getattr(results, view)
        if value is None:
            continue
        cells: tuple[str, ...] = ()
        if view == "dense":
            cells = ("0.0 %", f"{dense:.4f}", _megabytes(results.dense_bytes_per_token), "1.00x")
        elif view == last:
            cells = (_percent(results.sparsity), f"{sparse:.4f}", _megabytes(results.bytes_per_token))
            cells += ("–" if results.bound is None else f"{results.bound:.2f}x",)
        elif view == "hard_before" and results.sparsity_before is not None:
            cells = (_percent(results.sparsity_before),)
        table.add_row(label, f"{value:.4f}", *cells)
    if results.floor is not None:
        table.add_row("floor: no expert at all", f"{results.floor:.4f}", "100.0 %")
    notes = [f"Data: {results.data}."] if results.data else []
    if results.sparsity is not None:
        notes.append(f"FLOPs saved: {100 * (1 - sparse / dense):.1f} % (GFLOPs are 2^30, as in the paper).")
    if (share_kept := results.span_kept) is not None:
        notes.append(f"Of the span from the floor to the dense start {100 * share_kept:.0f} % is kept.")
    if (latency := results.latency_of) is not None:
        notes.append(
            f"Measured: {results.speedup:.2f}x as fast as dense, {results.latency_ms:.2f} ms per {latency['call']} of "
            f"{latency['rows']} rows ({latency['dtype']}, {latency['device']}, {latency['threads']} threads, "
            f"load {latency['load']})."
        )
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results.seconds_per_stage.items())
    notes += filter(None, remarks)
    table.caption = "\n".join([*notes, f"Time: {times}."])
    table.caption_justify = "left"
    return table


def _megabytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:.3f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def test_table(task: str, evaluation: Evaluation, remark: str | None) -> Table:
    """Lays a test's values out for reading. Its file has the values of each layer, subject and score."""
    table = Table(title=f"{task}: test", title_justify="left", caption=remark, caption_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in evaluation.others.items():
        if isinstance(value, int | float | None):
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    for label, form, number, unit in (
        ("FFN sparsity", "{:.1%}", evaluation.sparsity, 1.0),
        ("GFLOPs/token (2^30)", "{:.4f}", evaluation.flops_per_token, GFLOP),
        ("MB/token", "{:.3f}", evaluation.bytes_per_token, 1e6),
        ("speed-up bound", "{:.2f}x", evaluation.bound, 1.0),
    ):
        if number is not None:
            table.add_row(label, form.format(number / unit))
    for name, counts in (("skipped_rows", evaluation.skipped_rows), ("cut_answers", evaluation.cut_answers)):
        for split, count in (counts or {}).items():
            table.add_row(f"{name}: {split}", str(count))
    return table


def show(table: Table) -> None:
    """Prints a table to the terminal, or to a file at a fixed width."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    console.print(table)

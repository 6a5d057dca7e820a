"""``lte harness``: a saved model on tasks of the lm-evaluation-harness."""

from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lte_lightning.errors import UserError, meant_path
from lte_lightning.files import require_place, write_text
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command; its first word may be the model.

    Raises:
        UserError: If an argument is wrong, a task unknown, or the harness is not installed.
    """
    call(harness, "lte harness", args, positional="model")


def harness(
    model: str,
    tasks: list[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Evaluates a saved LTE model, in the mode it was saved in, on tasks of the lm-evaluation-harness.

    lte harness RUN --tasks arc_easy hellaswag

    Args:
        model: Folder of a saved LTE model, a run's folder, or a hub id.
        tasks: Names of the harness's tasks.
        num_fewshot: Examples before each question. By default as the task says.
        limit: Only so many rows of each task.
        batch_size: Requests per batch.
        include: Folder of your own tasks' YAML files.
        out: Write the results to this file, as JSON.
        json: Print JSON instead of a table.

    Raises:
        UserError: If an argument is wrong, a task unknown, or the harness is not installed.
    """
    from lte_lightning.core.model.folder import find_model, is_lte
    from lte_lightning.tasks.harness import evaluate_saved

    source = find_model(model)
    if not is_lte(source):
        near = "" if Path(source).exists() else meant_path(source)
        raise UserError(f"{model} is no saved LTE model{near}; the harness's own command evaluates a plain model")
    if out:
        require_place(out)
    names = [name for word in tasks for name in word.split(",") if name]
    results = evaluate_saved(source, names, include, batch_size, num_fewshot=num_fewshot, limit=limit)
    text = dumps(results, indent=2, default=str)
    if json:
        print(text)
    else:
        console = Console()
        (console if console.is_terminal else Console(width=100)).print(results_table(model, results))
    if out:
        write_text(out, text + "\n")


def results_table(model: str, results: dict[str, dict[str, Any]]) -> Table:
    """Returns a row for each metric of each task.

    Args:
        model: What was evaluated, for the title.
        results: As the harness gives them: values by ``metric,filter`` and ``metric_stderr,filter``, and an ``alias``.
    """
    table = Table(title=model, title_justify="left")
    for column in ("task", "metric", "value", "standard error"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, values in results.items():
        label = str(values.get("alias", task))
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            spread = f"{error:.4f}" if isinstance(error, float) else "-"
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            table.add_row(label, metric if kind == "none" else f"{metric} ({kind})", text, spread)
            label = ""
    return table

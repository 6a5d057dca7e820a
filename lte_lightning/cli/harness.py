"""``lte harness``: a saved model on tasks of the lm-evaluation-harness."""

import json
from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.files import write_text
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command; the results are printed as JSON.

    Raises:
        UserError: If an argument is wrong, a task unknown, or the harness is not installed.
    """
    call(harness, "lte harness", args)


def harness(
    model: str,
    tasks: list[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include: str | None = None,
    out: Path | None = None,
) -> None:
    """Evaluates a saved LTE model, in the mode it was saved in, on tasks of the lm-evaluation-harness.

    Args:
        model: Folder of a saved LTE model, or its hub id.
        tasks: Names of the harness's tasks.
        num_fewshot: Examples before each question. By default as the task says.
        limit: Only so many rows of each task.
        batch_size: Requests per batch.
        include: Folder of your own tasks' YAML files.
        out: Write the results to this file, too.

    Raises:
        UserError: If an argument is wrong, a task unknown, or the harness is not installed.
    """
    from lte_lightning.core.model.checkpoint import is_lte
    from lte_lightning.tasks.harness import evaluate_saved

    if not is_lte(model):
        raise UserError(
            f"{model} is no saved LTE model (a run's folder model/ is one); the harness's own command evaluates a "
            "plain model"
        )
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"no folder {out.absolute().parent} to write {out.name} to")
    names = [name for word in tasks for name in word.split(",") if name]
    results = evaluate_saved(model, names, include, batch_size, num_fewshot=num_fewshot, limit=limit)
    text = json.dumps(results, indent=2, default=str)
    print(text)
    if out:
        write_text(out, text + "\n")

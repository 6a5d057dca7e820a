"""``lte harness``: a saved model on tasks of the lm-evaluation-harness."""

import argparse
import json
from pathlib import Path

from lte_lightning.core.model.folder import is_lte
from lte_lightning.errors import UserError
from lte_lightning.tasks.harness import evaluate_saved


def main(args: list[str]) -> None:
    """Runs the command; the figures are printed as JSON.

    Raises:
        UserError: If an argument is wrong, a task unknown, or the harness is not installed.
    """
    options = _parser().parse_args(args)
    if not is_lte(options.model):
        raise UserError(f"{options.model} is no saved LTE model (a run's folder model/ is one); the harness's own "
                        "command evaluates a plain model")  # fmt: skip
    tasks = [name for word in options.tasks for name in word.split(",") if name]
    out = Path(options.out) if options.out else None
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"no folder {out.absolute().parent} to write {out.name} to")
    found = evaluate_saved(
        options.model, tasks, options.include, options.batch_size, num_fewshot=options.num_fewshot, limit=options.limit
    )
    text = json.dumps(found, indent=2, default=str)
    print(text)
    if out:
        out.write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte harness",
        description="Evaluates a saved LTE model, in the mode it was saved in, on tasks of the lm-evaluation-harness.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder of a saved LTE model, or its hub id")
    parser.add_argument("--tasks", required=True, nargs="+", help="names of the harness's tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: as the task says)")
    parser.add_argument("--limit", type=int, help="only so many rows of each task")
    parser.add_argument("--batch-size", type=int, default=1, help="requests per batch (default: 1)")
    parser.add_argument("--include", metavar="FOLDER", help="folder of your own tasks' YAML files")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this file, too")
    return parser

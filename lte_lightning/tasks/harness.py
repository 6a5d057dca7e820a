"""Any task of the lm-evaluation-harness on a converted model: ``pip install "lte-lightning[harness]"``.

From the shell: ``python -m lte_lightning.tasks.harness RUN/model --tasks '[arc_easy, mmlu]' --num_fewshot 5``.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lte_lightning.core.checkpoint import from_pretrained
from lte_lightning.core.errors import UserError


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str | dict[str, Any]],
    batch_size: int = 1,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs harness tasks on a model in the mode that it is in.

    Args:
        model: A causal language model or an encoder-decoder, converted or not; it is put in eval mode.
        tokenizer: Its tokenizer.
        tasks: Names of the harness's tasks, or their configurations.
        batch_size: Requests per batch.
        **kwargs: Passed to ``lm_eval.simple_evaluate``: ``num_fewshot``, ``limit``, ...

    Returns:
        The figures of each task, as the harness names them.

    Raises:
        UserError: If the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f'this needs the lm-evaluation-harness: pip install "lte-lightning[harness]" ({error})'
        ) from error
    wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    found: dict[str, Any] = simple_evaluate(wrapped, tasks=tasks, **kwargs)
    return found["results"]


def main(
    model: str,
    tasks: list[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    out: str | None = None,
) -> None:
    """Evaluates a saved LTE model, in the mode it was saved in, and prints the figures as JSON.

    Args:
        model: Its folder, or hub id.
        tasks: Names of harness tasks.
        num_fewshot: Examples before each question; by default as the task says.
        limit: Only so many rows of each task.
        batch_size: Requests per batch.
        out: Write the figures to this file, too.
    """
    options = {"num_fewshot": num_fewshot, "limit": limit}
    loaded, tokenizer = from_pretrained(model), AutoTokenizer.from_pretrained(model)
    text = json.dumps(evaluate(loaded, tokenizer, list(tasks), batch_size, **options), indent=2, default=str)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=True)

"""Any task of the lm-evaluation-harness on a converted model: ``pip install "lte-lightning[harness]"``.

From the shell: ``lte harness --model RUN/model --tasks arc_easy hellaswag --num-fewshot 5``.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.errors import UserError, meant


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
        raise _missing(error) from error
    wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    results: dict[str, Any] = simple_evaluate(wrapped, tasks=tasks, **kwargs)
    return results["results"]


def evaluate_saved(
    model: str, tasks: list[str], include: str | None = None, batch_size: int = 1, **kwargs: Any
) -> dict[str, Any]:
    """Runs harness tasks on a saved LTE model, in the mode that it was saved in.

    Args:
        model: Its folder, or hub id.
        tasks: Names of the harness's tasks, or of those in ``include``.
        include: Folder of further tasks' YAML files.
        batch_size: Requests per batch.
        **kwargs: As for `evaluate`.

    Returns:
        The figures of each task, as the harness names them.

    Raises:
        UserError: If the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing(error) from error
    if include is not None and not Path(include).is_dir():
        raise UserError(f"no folder {include} of tasks")
    manager = TaskManager(include_path=include)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        near = meant(unknown[0], manager.all_tasks)
        raise UserError(f"the harness has no task {', '.join(unknown)}{near}")
    loaded, tokenizer = from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return evaluate(loaded, tokenizer, list(tasks), batch_size, task_manager=manager, **kwargs)


def _missing(error: ImportError) -> UserError:
    return UserError(f'this needs the lm-evaluation-harness: pip install "lte-lightning[harness]" ({error})')

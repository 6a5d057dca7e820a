"""Data-to-text and summarisation: E2E and XSum as a data module, from the hub or from a folder."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lte_lightning.data.checks import require_text
from lte_lightning.data.example import Example
from lte_lightning.data.packaged import DataError
from lte_lightning.data.prompts import PromptData
from lte_lightning.errors import meant


@dataclass(frozen=True)
class GenerationTask:
    """Columns, prompt and source of a generation task.

    Args:
        columns: Names of the input's and the answer's column.
        prompt: The input goes in the braces (the paper's scripts).
        source: The hub data set and a revision of it that holds Parquet files, for `datasets` runs no scripts.
    """

    columns: tuple[str, str]
    prompt: str
    source: tuple[str, str]


_PARQUET = "refs/convert/parquet"
GENERATION_TASKS = {
    "e2e": GenerationTask(
        ("meaning_representation", "human_reference"), "Input:\n{}\n---\nOutput:\n", ("tuetschek/e2e_nlg", _PARQUET)
    ),
    "xsum": GenerationTask(
        ("document", "summary"), "Summarize this document:\n{}\n---\nSummary:\n", ("EdinburghNLP/xsum", _PARQUET)
    ),
}


class GenerationData(PromptData):
    """E2E or XSum, tokenised once, in batches of similar length.

    A decoder reads `prompt answer EOS` with the loss on answer and EOS; an encoder-decoder reads the prompt with its
    encoder. An input that is too long loses its end, and the words around it stay, so that prompt and `max_new_tokens`
    fit `max_length`, in training as in generation. Rows with the same input are one example of several references
    when something is generated.

    Args:
        task: e2e or xsum.
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model. Without a pad token, EOS
            pads.
        source: Folder with train.jsonl, validation.jsonl, ... (also json, csv, tsv, parquet), or id of a data set on
            the hub; the task's own by default.
        revision: Branch or commit of the hub data set.
        max_length: Tokens of prompt and answer together (of each, for an encoder-decoder).
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per validation, test and prediction batch and device.
        holdout: Share of the training rows, up to 0.5, that becomes the validation set; the official validation rows
            are then the test set. With 0 they serve as both, unless the source has a test split with answers.
        **kwargs: See `PromptData`.
    """

    def __init__(
        self,
        task: str,
        tokenizer: str,
        source: str | None = None,
        revision: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        holdout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if task not in GENERATION_TASKS:
            near = meant(task, GENERATION_TASKS)
            raise DataError(f"unknown generation task {task!r}{near}; known are {', '.join(GENERATION_TASKS)}")
        known = GENERATION_TASKS[task]
        self.columns, self.targets = known.columns, known.columns[1:]
        self._prompt = known.prompt
        super().__init__(
            task=task,
            tokenizer=tokenizer,
            source=source or known.source[0],
            subset=None,
            revision=revision or (None if source else known.source[1]),
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            holdout=holdout,
            **kwargs,
        )

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that inputs and answers are text."""
        require_text(rows, rows.column_names, name)

    def has_targets(self, rows: Dataset) -> bool:
        """Says whether a split has answers; some test splits have empty ones."""
        return super().has_targets(rows) and any(rows[self.columns[1]][:])

    def recipe(self) -> list[Any]:
        """Returns the prompt, and how much of it is kept."""
        return [self._prompt, self.prompt_limit]

    def examples(self, rows: list[dict[str, Any]]) -> list[Example]:
        """Returns prompts, cut where they must be, and answers."""
        inputs, answers = ([row.get(column, "") for row in rows] for column in self.columns)
        prompts = [self._prompt.format(text) for text in inputs]
        lengths = [len(ids) for ids in self.tokenizer(prompts, add_special_tokens=False)["input_ids"]] if rows else []
        special = self.tokenizer.num_special_tokens_to_add() if self.encoder_decoder else len(self._opening)
        limit = self.prompt_limit - special
        fitting = [length <= limit for length in lengths]
        prompts = [
            prompt if fits else self._shorten(text, limit)
            for prompt, text, fits in zip(prompts, inputs, fitting, strict=True)
        ]
        return [
            Example([(prompt, False), (answer, True)], shortened=not fits)
            for prompt, answer, fits in zip(prompts, answers, fitting, strict=True)
        ]

    def _shorten(self, text: str, limit: int) -> str:
        ends = [
            end
            for _, end in self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        keep = len(ends)
        while True:
            prompt = self._prompt.format(text[: ends[keep - 1]] if keep else "")
            excess = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"]) - limit
            if excess <= 0:
                return prompt
            if not keep:
                raise DataError(
                    f"max_length is {self.max_length}: {limit} tokens before {self.max_new_tokens} new ones do not "
                    f"hold the prompt around the input; raise max_length by {excess} at least"
                )
            keep = max(0, keep - excess)

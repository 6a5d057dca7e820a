"""MMLU: multiple-choice questions with examples before them, from the hub or from a folder."""

from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lte_lightning.core.model.head import IGNORED
from lte_lightning.data.base import TextData
from lte_lightning.data.checks import require_at_least, require_text
from lte_lightning.data.packaged import DataError
from lte_lightning.data.padding import PadsRight
from lte_lightning.data.text import Loader

LETTERS = ("A", "B", "C", "D")


class MmluData(TextData):
    """MMLU questions after their subject's examples, for evaluation alone.

    A prompt is a headline with the subject, `shots` answered questions of the subject's `dev` rows, and the question,
    as MMLU's authors write it; where that exceeds `max_length`, the last examples are left out, counted
    and reported. Rows whose answer is none of the four, or that have not four choices, are left out, counted and
    reported.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: Folder with dev.jsonl and test.jsonl (also json, parquet) with columns `question`, `subject`, `choices`
            (four) and `answer` (0 to 3, or A to D), or id of a data set on the hub.
        subset: Name of the hub data set's configuration.
        revision: Branch or commit of the hub data set.
        subjects: Only these; all by default.
        shots: Examples before each question.
        max_length: Tokens of prompt and answer together.
        eval_batch_size: Questions per batch and device.
        seed: Not used: nothing is drawn.

    Attributes:
        subjects: Names of the subjects of the test rows, in order.
        fewer_shots: How many prompts have fewer than `shots` examples, for want of room.
    """

    columns = ("question", "subject", "choices", "answer")
    validation_splits = ("dev",)
    generates = True

    def __init__(
        self,
        tokenizer: str,
        source: str = "cais/mmlu",
        subset: str | None = "all",
        revision: str | None = None,
        subjects: list[str] | None = None,
        shots: int = 5,
        max_length: int = 2048,
        eval_batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task="mmlu",
            tokenizer=tokenizer,
            source=source,
            subset=subset,
            revision=revision,
            max_length=max_length,
            batch_size=1,
            eval_batch_size=eval_batch_size,
            holdout=0.0,
            train_rows=None,
            seed=seed,
        )
        require_at_least(shots=(shots, 0))
        self.shots = shots
        self.subjects: list[str] = []
        self.fewer_shots = 0
        self._wanted = subjects

    def setup(self, stage: str) -> None:
        """Prepares the test rows; there is nothing to train on."""
        if stage in ("fit", "validate"):
            raise DataError(f"MMLU is an evaluation: run `lightning test`, not {stage}")
        super().setup(stage)

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that questions and subjects are text."""
        require_text(rows, ("question", "subject"), name)

    def prepare(self, role: str) -> list[Dataset]:
        """Writes and tokenises the prompts."""
        rows = [(number, _with_key(row)) for number, row in enumerate(self.split("test").to_list())]
        if self._wanted is not None:
            missing = sorted(set(self._wanted) - {row["subject"] for _, row in rows})
            if missing:
                raise DataError(f"{self.source} has no subject {', '.join(missing)}")
            rows = [(number, row) for number, row in rows if row["subject"] in self._wanted]
        numbered = [(number, row) for number, row in rows if row["key"] is not None]
        self._skip("test", len(rows), len(rows) - len(numbered), "their answer is none of A, B, C, D (0 to 3)")
        if not numbered:
            raise DataError(f"{self.source}: no test row has an answer from 0 to 3 (or A to D) and four choices")
        self.subjects = sorted({row["subject"] for _, row in numbered})
        examples = self._examples()
        letters = self._letter_ids()
        prompts, self.fewer_shots = [], 0
        for number, row in numbered:
            ids, shots = self._prompt_ids(row, examples.get(row["subject"], []))
            if ids is None:
                continue
            self.fewer_shots += shots < self.shots
            prompts.append(
                {
                    "input_ids": [*ids, letters[row["key"]]],
                    "length": len(ids) + 1,
                    "row": number,
                    "subject": self.subjects.index(row["subject"]),
                    "answer": row["key"],
                }
            )
        too_long = len(numbered) - len(prompts)
        self._skip("test prompts", len(numbered), too_long, f"they are longer than {self.max_length} tokens alone")
        if not prompts:
            raise DataError(f"every question is longer than max_length, {self.max_length} tokens")
        if self.fewer_shots:
            fewer = f"{self.fewer_shots} of {len(prompts)} prompts have fewer than {self.shots} examples"
            rank_zero_warn(f"{fewer}, to fit max_length, {self.max_length} tokens")
        return [Dataset.from_list(prompts)]

    def _examples(self) -> dict[str, list[str]]:
        if not self.shots:
            return {}
        by_subject: dict[str, list[str]] = {}
        for number, row in enumerate(_with_key(row) for row in self.split("dev").to_list()):
            if row["key"] is None:
                raise DataError(f"{self._name('dev')}, row {number} (from 0): answer is {row['answer']!r}, not 0 to 3")
            by_subject.setdefault(row["subject"], []).append(f"{_question(row)} {LETTERS[row['key']]}\n\n")
        for subject in self.subjects:
            if len(by_subject.get(subject, [])) < self.shots:
                raise DataError(
                    f"{self._name('dev')} has {len(by_subject.get(subject, []))} rows of {subject}, fewer than the "
                    f"{self.shots} of shots"
                )
        return {subject: examples[: self.shots] for subject, examples in by_subject.items()}

    def _prompt_ids(self, row: dict[str, Any], examples: list[str]) -> tuple[list[int] | None, int]:
        subject = row["subject"].replace("_", " ")
        opening = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for shots in range(len(examples), -1, -1):
            ids = self.tokenizer(opening + "".join(examples[:shots]) + _question(row))["input_ids"]
            ids = ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
            if len(ids) < self.max_length:
                return ids, shots
        return None, 0

    def _letter_ids(self) -> list[int]:
        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        before = encode("Answer:")
        letters = [encode(f"Answer: {letter}") for letter in LETTERS]
        if any(ids[:-1] != before for ids in letters) or len({ids[-1] for ids in letters}) < len(LETTERS):
            raise DataError(
                f"tokenizer {self._tokenizer_name!r} does not write ' A' to ' D' behind 'Answer:' as one token each, "
                "so their likelihoods cannot be compared; use the lm-evaluation-harness"
            )
        self.letter_ids = [ids[-1] for ids in letters]
        return self.letter_ids

    def collate(self) -> "CollateQuestions":
        """Pads on the right."""
        return CollateQuestions(self.tokenizer.pad_token_id)

    def predict_dataloader(self) -> Loader:
        """Every question, in the order of the file."""
        return self.loader_in_order(self._ready["test"][0], self.collate())


class CollateQuestions(PadsRight):
    """Makes a batch of questions, each with its answer's letter as the last token, which alone carries the loss."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels [B, T]; row, subject and answer [B]."""
        batch = self.padded([row["input_ids"] for row in rows])
        last_B = batch["attention_mask"].sum(1, keepdim=True) - 1
        labels_BT = torch.full_like(batch["input_ids"], IGNORED)
        labels_BT.scatter_(1, last_B, batch["input_ids"].gather(1, last_B))
        return batch | {"labels": labels_BT} | {k: torch.tensor([row[k] for row in rows]) for k in QUESTION_KEYS}


QUESTION_KEYS = ("row", "subject", "answer")


def _with_key(row: dict[str, Any]) -> dict[str, Any]:
    answer, choices = row["answer"], row["choices"]
    key = LETTERS.index(answer) if answer in LETTERS else answer
    usable = isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 4
    usable = usable and isinstance(choices, list) and len(choices) == 4
    return row | {"key": key if usable else None}


def _question(row: dict[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"

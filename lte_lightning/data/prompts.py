"""Prompts and answers as tokens: where the loss is, and which rows are cut or left out."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lte_lightning.core.model.head import IGNORED
from lte_lightning.data.checks import require_at_least, rows_of
from lte_lightning.data.example import Example
from lte_lightning.data.packaged import DataError
from lte_lightning.data.padding import CollateAnswers, CollatePrompts
from lte_lightning.data.streaming import Mark, StreamingData
from lte_lightning.data.text import Loader, fingerprint, is_encoder_decoder

_ENCODING = 4  # part of the cache's key; raise it when the same rows shall give other tokens


class PromptData(StreamingData):
    """Rows of a prompt and an answer; a subclass writes them as text.

    Args:
        max_new_tokens: Tokens to generate at most.
        **kwargs: See `StreamingData`.
    """

    predict_role = "predict"
    generates = True

    def __init__(self, max_new_tokens: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_at_least(max_new_tokens=(max_new_tokens, 1))
        self.max_new_tokens = max_new_tokens
        self.cut_answers: dict[str, int] = {}  # rows of each role whose answers lost their end
        self._counted = 0  # rows of a stream that were looked at

    # The task, by the subclass

    def examples(self, rows: list[dict[str, Any]]) -> list[Example]:
        """Returns the rows as text."""
        raise TypeError(f"{type(self).__name__} must define examples")

    def recipe(self) -> list[Any]:
        """Returns the options that the text depends on, which are part of the key of the cache."""
        return []

    # Tokens

    @functools.cached_property
    def encoder_decoder(self) -> bool:
        """Says whether the model beside the tokenizer reads the prompt with an encoder."""
        return is_encoder_decoder(self._tokenizer_name)

    @property
    def prompt_limit(self) -> int:
        """Tokens that a prompt may have, to leave room for generation."""
        room = self.max_length if self.encoder_decoder else self.max_length - self.max_new_tokens
        if room < 1:
            raise DataError(
                f"max_length is {self.max_length}, which leaves no room for a prompt before {self.max_new_tokens} new "
                "tokens; raise max_length or lower max_new_tokens"
            )
        return room

    def prompt_ids(self, example: Example) -> list[int]:
        """Returns the tokens to generate from."""
        if self.encoder_decoder:
            return self.tokenizer(example.prompt)["input_ids"]
        ids = self.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        return ids if example.verbatim else [*self._opening, *ids]

    @functools.cached_property
    def _opening(self) -> list[int]:
        # The tokens that the tokenizer puts before a text (LLaMA's BOS), without those after it.
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        first_text = encoded["special_tokens_mask"].index(0)
        return encoded["input_ids"][:first_text]

    def _encode(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = list(rows)
        examples = self.examples([dict(zip(columns, row, strict=True)) for row in zip(*rows.values(), strict=True)])
        encode = self._encode_pairs if self.encoder_decoder else self._encode_chains
        encoded = encode(examples)
        encoded["empty"] = [not self.plain(example) for example in examples]
        for labels in (labels for labels, empty in zip(encoded["labels"], encoded["empty"], strict=True) if empty):
            labels[:] = [IGNORED] * len(labels)
        # The first label is never asked for in a decoder: nothing stands before it.
        first = 0 if self.encoder_decoder else 1
        encoded["answer_tokens"] = [sum(label != IGNORED for label in row[first:]) for row in encoded["labels"]]
        encoded["cut"] = [cut and n > 0 for cut, n in zip(encoded["cut"], encoded["answer_tokens"], strict=True)]
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        encoded["shortened"] = [
            cut or example.shortened for cut, example in zip(encoded["shortened"], examples, strict=True)
        ]
        return encoded

    def _encode_chains(self, examples: list[Example]) -> dict[str, list[Any]]:
        texts = [text for example in examples for text, _ in example.segments]
        pieces = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        encoded: dict[str, list[Any]] = {"input_ids": [], "labels": [], "shortened": [], "cut": []}
        for example in examples:
            ids = [] if example.verbatim else list(self._opening)
            labels = [IGNORED] * len(ids)
            for _, is_answer in example.segments:
                piece = next(pieces)
                if is_answer and not example.verbatim:
                    piece = [*piece, self.tokenizer.eos_token_id]
                ids += piece
                labels += piece if is_answer else [IGNORED] * len(piece)
            encoded["input_ids"].append(ids[: self.max_length])
            encoded["labels"].append(labels[: self.max_length])
            encoded["shortened"].append(False)
            encoded["cut"].append(any(label != IGNORED for label in labels[self.max_length :]))
        return encoded

    def _encode_pairs(self, examples: list[Example]) -> dict[str, list[Any]]:
        cut = {"truncation": True, "max_length": self.max_length}
        prompts = self.tokenizer([example.prompt for example in examples], **cut)
        answers = self.tokenizer(text_target=[example.answer for example in examples], **cut)
        return {
            "input_ids": prompts["input_ids"],
            "labels": answers["input_ids"],
            "shortened": [bool(encoding.overflowing) for encoding in prompts.encodings],
            "cut": [bool(encoding.overflowing) for encoding in answers.encodings],
        }

    # Rows

    def prepare(self, role: str) -> list[Dataset]:
        """Tokenises prompts with their answers; for the test also every distinct prompt, with all its answers.

        Predictions need the prompts alone.
        """
        if role in ("test", "predict"):
            _ = self.prompt_limit  # before anything is read
        sets, parts = self.rows(role), []
        if role == "predict":
            return [self._prompts(sets[0], role)]
        for rows in sets:
            key = [self.recipe(), self.max_length, self.encoder_decoder, self.tokenizer.chat_template, _ENCODING]
            encoded = rows.map(
                self._encode,
                batched=True,
                remove_columns=rows.column_names,
                new_fingerprint=fingerprint(rows, self.tokenizer, *key),
                desc=f"Tokenising {role}",
            )
            kept = [i for i, count in enumerate(encoded["answer_tokens"][:]) if count]
            self._report(role, len(rows), len(rows) - len(kept), sum(encoded["empty"][:]), sum(encoded["shortened"][:]))
            self._report_cut(role, len(kept), sum(encoded["cut"][:]))
            # Always a selection: `select` of all rows is the table itself.
            parts.append(encoded.select(kept).select_columns(["input_ids", "labels", "length"]))
        return [*parts, self._prompts(sets[0], role)] if role == "test" else parts

    def encode_pass(self, mark: Mark) -> Iterator[tuple[Mark, dict[str, Any]]]:
        """Yields rows with their answers, and counts the rows left out."""
        for first, rows in self.chunks(*mark):
            encoded = self._encode(rows[:])
            usable = [count > 0 for count in encoded["answer_tokens"]]
            self._count(first, usable, sum(encoded["shortened"]))
            for i in (i for i, use in enumerate(usable) if use):
                ids, labels = (np.array(encoded[name][i], dtype=np.int32) for name in ("input_ids", "labels"))
                yield (first + i,), {"input_ids": ids, "labels": labels, "length": len(ids)}

    def _count(self, first: int, usable: list[bool], shortened: int) -> None:
        if first == self._counted == 0 and shortened:
            rank_zero_info(
                f"{shortened} of the first {len(usable)} training inputs were cut to {self.max_length} tokens"
            )
        fresh = max(self._counted - first, 0)
        if skipped := len(usable[fresh:]) - sum(usable[fresh:]):
            if "train" not in self.skipped:
                rank_zero_warn(
                    f"training rows are left out, first row {first + usable.index(False)} (from 0): their answer is "
                    f"empty or does not fit into {self.max_length} tokens; the results count them as skipped_rows"
                )
            self.skipped["train"] = self.skipped.get("train", 0) + skipped
        self._counted = max(self._counted, first + len(usable))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state and {**state, "counted": self._counted, "skipped": self.skipped.get("train", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self._stream and state_dict["counted"] > self._counted:
            self._counted = state_dict["counted"]
            self.skipped |= {"train": state_dict["skipped"]} if state_dict["skipped"] else {}

    def _report(self, role: str, rows: int, skipped: int, empty: int, shortened: int) -> None:
        if shortened:
            rank_zero_info(f"the inputs of {shortened} of {rows} {rows_of(role)} were cut to {self.max_length} tokens")
        if skipped == rows:
            raise DataError(
                f"none of the {rows} {rows_of(role)} has an answer within its first {self.max_length} tokens: {empty} "
                f"are missing or empty, max_length is too low for {skipped - empty}"
            )
        reason = f"their answer does not fit into {self.max_length} tokens ({skipped - empty}), or is empty ({empty})"
        self._skip(role, rows, skipped, reason)

    def _report_cut(self, role: str, rows: int, cut: int) -> None:
        if cut:
            self.cut_answers[role] = cut
            rank_zero_warn(
                f"the answers of {cut} of {rows} {rows_of(role)} do not end within {self.max_length} tokens; the loss "
                "leaves out the rest: raise max_length"
            )

    def _prompts(self, rows: Dataset, role: str) -> Dataset:
        prompts, too_long = self._prompts_that_fit(rows, answered=role != "predict")
        if not prompts:
            raise DataError(
                f"every prompt of the {rows_of(role)} is longer than {self.prompt_limit} tokens, which max_length "
                f"{self.max_length} leaves before {self.max_new_tokens} new tokens"
            )
        why = f"their prompts are longer than {self.prompt_limit} tokens; raise max_length or lower max_new_tokens"
        self._skip(f"{role} prompts", len(prompts) + too_long, too_long, why)
        prompts.sort(key=lambda prompt: -prompt["length"])
        return Dataset.from_list(prompts)

    def _prompts_that_fit(self, rows: Dataset, answered: bool) -> tuple[list[dict[str, Any]], int]:
        """Returns the distinct prompts that leave room to generate, and the number of others."""
        fitting: dict[str, dict[str, Any]] = {}
        for row, example in enumerate(self.examples(rows.to_list())):
            reference = self.plain(example)
            if answered and not reference:
                continue
            entry = fitting.setdefault(example.prompt, {"row": row, "example": example, "references": []})
            entry["references"] += [reference] if reference else []
        prompts = []
        for entry in fitting.values():
            ids = self.prompt_ids(entry["example"])
            if len(ids) <= self.prompt_limit:
                text = {"prompt": entry["example"].prompt, "references": entry["references"]}
                prompts.append({"row": entry["row"], "input_ids": ids, "length": len(ids), **text})
        return prompts, len(fitting) - len(prompts)

    def plain(self, example: Example) -> str:
        """Returns the last answer as text, without the chat template's frame."""
        if not example.verbatim:
            return example.answer.strip()
        return self.decode(self.tokenizer(example.answer, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Returns tokens as text, without special ones."""
        text = self.tokenizer.decode(list(ids) if isinstance(ids, Sequence) else ids, skip_special_tokens=True)
        return str(text).strip()

    # Batches

    def collate(self) -> CollateAnswers:
        """Pads on the right, with labels on the answers."""
        return CollateAnswers(self.tokenizer.pad_token_id)

    def test_dataloader(self) -> list[Loader]:
        """Every answer once, for the loss; then every distinct prompt once, for generation."""
        answers, prompts = self._ready["test"]
        return [self.loader(answers, self.eval_batch_size), self.loader_in_order(prompts, self.collate_prompts())]

    def predict_dataloader(self) -> Loader:
        """Every distinct prompt of the rows to predict once, longest first."""
        return self.loader_in_order(self._ready["predict"][0], self.collate_prompts())

    def sample_prompts(self, count: int) -> dict[str, Any] | None:
        """Returns a batch of the first distinct prompts of the validation rows; None if all of these are too long."""
        rows = self.rows("validation")[0]
        prompts, _ = self._prompts_that_fit(rows.select(range(min(len(rows), 8 * count))), answered=True)
        return self.collate_prompts()(prompts[:count]) if prompts else None

    def collate_prompts(self) -> CollatePrompts:
        """Pads prompts on the left, where a decoder goes on from them."""
        return CollatePrompts(self.tokenizer.pad_token_id, "right" if self.encoder_decoder else "left")

"""Instruction tuning: Alpaca's columns or conversations as a data module, from the hub or from a folder."""

from typing import Any, Literal

from datasets import Dataset
from jinja2 import TemplateError
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lte_lightning.data.chats import (
    ALPACA,
    FORMS,
    SYSTEM,
    Form,
    Messages,
    answered,
    carries_loss,
    conversation,
    find_form,
)
from lte_lightning.data.checks import count_blank, report_blank, require_text
from lte_lightning.data.example import Example
from lte_lightning.data.labels import listed
from lte_lightning.data.packaged import DataError
from lte_lightning.data.prompts import PromptData

_TASK = "Below is an instruction that describes a task"
_WANTED = "Write a response that appropriately completes the request."


class InstructData(PromptData):
    """Instructions, prompts or conversations with their answers, tokenised once, with the loss on the answers only.

    Rows have one of these forms, found by their columns: `messages`, lists of a `role` (system, user, assistant) and
    its `content`; ShareGPT's `conversations`, lists of `from` (human, gpt) and `value`; Alpaca's `instruction`, `input`
    and `output`; or `prompt` and `completion`. A column `system` opens its row's conversation. Every answer of a
    conversation carries loss, and so does the token that ends it, but for empty answers and those of `weight` 0. The
    tokenizer's chat template writes the rows. Without a template a prompt and its completion stay as they
    are, and Alpaca's prompt writes all others, once for each turn of a conversation. Rows whose answers lie beyond
    `max_length` are left out, counted and reported.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: One file (jsonl, json, csv, tsv, parquet; compressed or not), folder with train.* and perhaps
            validation.* and test.*, or id of a data set on the hub.
        revision: Branch or commit of the hub data set.
        columns: Names of your columns, if they are others: one of conversations; two of a prompt and its answer; three
            of an instruction, its input and the answer.
        prompt: `chat` for the tokenizer's chat template, `alpaca` for Alpaca's prompt, `plain` for a prompt and its
            answer as they are, `auto` for the first where there is one.
        max_length: Tokens of prompt and answer together.
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per validation, test and prediction batch and device.
        **kwargs: See `PromptData`.
    """

    hint = "; conversations are in `messages` or `conversations`; other names are given by data.columns"

    def __init__(
        self,
        tokenizer: str,
        source: str = "tatsu-lab/alpaca",
        revision: str | None = None,
        columns: list[str] | None = None,
        prompt: Literal["auto", "chat", "alpaca", "plain"] = "auto",
        max_length: int = 512,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        if columns is not None and not 1 <= len(set(columns)) == len(columns) <= 3:
            raise DataError(
                f"columns is {columns!r}: name one column of conversations, two of a prompt and its answer, or three "
                "of an instruction, its input and the answer"
            )
        super().__init__(
            task="instruct",
            tokenizer=tokenizer,
            source=source,
            subset=None,
            revision=revision,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **kwargs,
        )
        self.prompt = prompt
        self._take(Form(tuple(columns), plain=len(columns) == 2) if columns else ALPACA)
        self._named = columns is not None

    def _take(self, form: Form) -> None:
        self.form, self.columns, self.targets = form, form.read, (*form.answer, SYSTEM)

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split, and recognise the form of the rows."""
        splits = super().load_splits()
        names = [rows.column_names for rows in splits.values()]
        if self.streaming:
            names.append(list(next(iter(self.open_stream()), {})))
        self._take((self.form if self._named else find_form(names)).with_system(names))
        present = list(dict.fromkeys(name for columns in names for name in columns))  # none in a file of texts
        if set(self.form.columns) - set(self.targets) <= set(present):
            if unread := [name for name in present if name not in self.columns]:
                rank_zero_info(f"columns of {self.source} that are not read: {listed(unread)}")
        elif not self._named and (
            likely := [column for column in present if column != SYSTEM and not column.casefold().endswith("id")]
        ):
            named = f'--data.columns "[{",".join(likely[:2])}]"'
            self.hint = f"{InstructData.hint}, for example {named} (lte init: --text and --label)"
        return splits

    def rows(self, role: str) -> list[Dataset]:
        """Returns the checked rows of a role. Rows to predict need no answer, and may end with the question."""
        name = "train" if self.is_file else "test"
        if role != "predict" or name not in self._splits:
            return super().rows(role)
        there = self._splits[name].column_names
        if len(there) == 1 and not self._named and not any(there[0] in form.columns for form in FORMS):
            self._take(Form((there[0], "completion"), plain=True))  # a lone column of texts asks
        rows = self.split(name, [column for column in self.columns if column not in self.targets or column in there])
        if self.form.is_conversation:
            column = self.columns[0]
            rows = Dataset.from_list([{column: answered(self.form.messages(row))} for row in rows.to_list()])
        return [rows]

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that everything is text, in known roles."""
        texts = [column for column in rows.column_names if not self._holds_messages(rows, column)]
        require_text(rows, texts, name, optional=self.form.optional)
        for column in [column for column in texts if column != SYSTEM][:1]:
            report_blank(count_blank(rows[column]), len(rows), column, name)
        for column in (column for column in rows.column_names if column not in texts):
            unasked = 0
            for row, turns in enumerate(rows[column][:]):
                if turns is None and column in self.form.optional:
                    continue
                try:
                    questions = [message["content"] for message in conversation(turns) if message["role"] == "user"]
                    unasked += count_blank(questions) > 0
                except DataError as error:
                    is_turn = " is no message" in str(error)
                    kind = "" if is_turn else f"{column} is "
                    raise DataError(f"{name}, row {row} (from 0): {kind}{error}") from None
            report_blank(unasked, len(rows), f"a question of {column}", name)

    def _holds_messages(self, rows: Dataset, column: str) -> bool:
        if column == SYSTEM or self.form.is_conversation:
            return column != SYSTEM
        return isinstance(next((value for value in rows[column] if value is not None), None), list | dict)

    @property
    def chat(self) -> bool:
        """Says whether the tokenizer's chat template is used."""
        if self.prompt == "chat" and not self.tokenizer.chat_template:
            raise DataError(
                f"tokenizer {self._tokenizer_name!r} has no chat template; use prompt alpaca, or a tokenizer with one"
            )
        return self.prompt in ("auto", "chat") and bool(self.tokenizer.chat_template)

    @property
    def plain_text(self) -> bool:
        """Says whether prompt and answer stand as they are."""
        if self.prompt == "plain" and len(self.form.columns) != 2:
            raise DataError(
                f"prompt is plain, but rows have {', '.join(self.form.columns)}, not a prompt and its answer"
            )
        return self.prompt == "plain" or (self.prompt == "auto" and self.form.plain and not self.chat)

    def recipe(self) -> list[Any]:
        """Returns how conversations are written."""
        if self.plain_text:
            return ["plain", self.columns]
        return ["chat" if self.chat else "alpaca", *(self.columns if self.columns != ALPACA.columns else ())]

    def examples(self, rows: list[dict[str, Any]]) -> list[Example]:
        """Returns prompts and answers."""
        return [self._example(row) for row in rows]

    def _example(self, row: dict[str, Any]) -> Example:
        if self.chat:
            return self._by_template(self.form.messages(row))
        if self.form.is_conversation or not isinstance(row[self.columns[0]], str):
            return _as_alpaca(self.form.messages(row))
        asked, context, answer = self.form.parts(row)
        if system := row.get(SYSTEM) if self.form.system else None:
            if not self.plain_text:
                return _as_alpaca(self.form.messages(row))
            asked = f"{system}\n\n{asked}"
        return Example([(asked if self.plain_text else alpaca_prompt(asked, context), False), (answer, True)])

    def _by_template(self, messages: Messages) -> Example:
        segments: list[tuple[str, bool]] = []
        rendered = ""
        for turn in range(len(messages)):
            if not carries_loss(messages, turn):
                continue
            prompt = self._render(messages[:turn], add_generation_prompt=True)
            whole = self._render(messages[: turn + 1])
            if not (prompt.startswith(rendered) and whole.startswith(prompt)):
                raise DataError(
                    f"the chat template of {self._tokenizer_name!r} writes earlier turns of a conversation differently "
                    "once later ones follow, so its answers cannot be told apart; use prompt alpaca"
                )
            answer, end, _ = whole[len(prompt) :].partition(self.tokenizer.eos_token)
            segments += [(prompt[len(rendered) :], False), (answer + end, True)]
            rendered = prompt + answer + end
        return Example(segments, verbatim=True)

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError) as error:  # the latter: one that begins with an answer
            raise DataError(
                f"the chat template of {self._tokenizer_name!r} refuses a conversation ({error}): {messages!r:.200}"
            ) from error
        return str(text)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Returns the prompt that Stanford Alpaca was trained with."""
    if not context:
        return f"{_TASK}. {_WANTED}\n\n{_alpaca_turn(instruction)}"
    opening = f"{_TASK}, paired with an input that provides further context. {_WANTED}"
    return f"{opening}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"


def _alpaca_turn(instruction: str) -> str:
    return f"### Instruction:\n{instruction}\n\n### Response:"


def _as_alpaca(messages: Messages) -> Example:
    segments: list[tuple[str, bool]] = []
    opening, asked = f"{_TASK}. {_WANTED}", ""
    for turn, message in enumerate(messages):
        if message["role"] == "system":
            opening = message["content"]
        elif message["role"] == "user":
            asked = message["content"]
        else:
            start = "\n\n" if segments else f"{opening}\n\n"
            segments += [(start + _alpaca_turn(asked), False), (message["content"], carries_loss(messages, turn))]
            asked = ""
    return Example(segments)

"""Instruction tuning: Alpaca's columns or conversations as a data module, from the hub or from a folder."""

from typing import Any, Literal

from datasets import Dataset
from jinja2 import TemplateError

from lte_lightning.data.checks import require_text
from lte_lightning.data.packaged import DataError
from lte_lightning.data.prompts import Example, PromptData

_TASK = "Below is an instruction that describes a task"
_WANTED = "Write a response that appropriately completes the request."
_ALPACA = ("instruction", "input", "output")
_ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


class InstructData(PromptData):
    """Instructions and answers, tokenised once, with the loss on the answers only.

    Rows have Alpaca's columns `instruction`, `input` and `output`, or Tulu's `messages`: lists of a `role` (system,
    user, assistant) and its `content`; every assistant turn is an answer. They are written by the tokenizer's chat
    template, where it has one, and else as Alpaca's prompt, which further turns of a conversation repeat. The loss is
    on the answers and the token that ends them. Rows whose answers lie beyond `max_length` are left out, counted and
    reported.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: Folder with train.jsonl and, unless some rows are held out, validation.jsonl (also json, csv, tsv,
            parquet), or id of a data set on the hub.
        revision: Branch or commit of the hub data set.
        prompt: `chat` for the tokenizer's chat template, `alpaca` for Alpaca's prompt, `auto` for the first where there
            is one.
        max_length: Tokens of prompt and answer together.
        max_new_tokens: Tokens to generate at most.
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per validation, test and prediction batch and device.
        holdout: Share of the training rows, up to 0.5, that becomes the validation set, and the test set of a source
            that has no other rows.
        train_rows: Train on a random subset of this many rows; all of them by default.
        seed: Decides the holdout, the subset and the order of training batches.
        streaming: Read and tokenise the training rows on the way, again and again, instead of all of them before: for
            sets that do not fit on the disk. Stages are then given in steps.
        shuffle_buffer: Rows of a stream to shuffle at a time; they are in memory, tokenised.
    """

    columns = _ALPACA

    def __init__(
        self,
        tokenizer: str,
        source: str = "tatsu-lab/alpaca",
        revision: str | None = None,
        prompt: Literal["auto", "chat", "alpaca"] = "auto",
        max_length: int = 512,
        max_new_tokens: int = 100,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        holdout: float = 0.0,
        train_rows: int | None = None,
        seed: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
    ) -> None:
        super().__init__(
            task="instruct",
            tokenizer=tokenizer,
            source=source,
            subset=None,
            revision=revision,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            holdout=holdout,
            train_rows=train_rows,
            seed=seed,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
        )
        self.prompt = prompt

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split, and see whether rows are conversations."""
        splits = super().load_splits()
        names = [rows.column_names for rows in splits.values()]
        if self.streaming:
            names.append(list(next(iter(self.open_stream()), {})))
        if any("messages" in columns for columns in names):
            self.columns = ("messages",)
        return splits

    def rows(self, role: str) -> list[Dataset]:
        """Returns the checked rows; held-out ones also for the test, if the source has nothing but training rows.

        For predictions those of ``test.*``, if there are; they need no ``output``, and may end with what is asked.
        """
        if role == "predict" and "test" in self._splits:
            test = self._splits["test"]
            rows = self.split("test", [name for name in self.columns if name != "output" or name in test.column_names])
            if self.columns != _ALPACA:
                rows = Dataset.from_list([{"messages": _answered(messages)} for messages in rows["messages"]])
            return [rows]
        if role in ("test", "predict") and self.holdout and set(self._splits) == {"train"}:
            return [self.held_out()]
        return super().rows(role)

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that everything is text, in known roles."""
        if self.columns == _ALPACA:
            require_text(rows, rows.column_names, name)
            return
        for row, messages in enumerate(rows["messages"]):
            if not messages:
                raise DataError(f"{name}, row {row} (from 0): messages is {messages!r}, not a conversation")
            for message in messages:
                if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
                    raise DataError(
                        f"{name}, row {row} (from 0): {message!r} is no message with a role ({', '.join(_ROLES)}) and "
                        "a text as content"
                    )

    @property
    def chat(self) -> bool:
        """Says whether the tokenizer's chat template is used."""
        if self.prompt == "chat" and not self.tokenizer.chat_template:
            raise DataError(
                f"tokenizer {self._tokenizer_name!r} has no chat template; use prompt alpaca, or a tokenizer with one"
            )
        return self.prompt != "alpaca" and bool(self.tokenizer.chat_template)

    def recipe(self) -> list[Any]:
        """How conversations are written."""
        return ["chat" if self.chat else "alpaca"]

    def examples(self, rows: list[dict[str, Any]]) -> list[Example]:
        """Returns prompts and answers."""
        if self.columns != _ALPACA:
            write = self._by_template if self.chat else _as_alpaca
            return [write(row["messages"]) for row in rows]
        if not self.chat:
            return [
                Example([(alpaca_prompt(row["instruction"], row["input"]), False), (row.get("output", ""), True)])
                for row in rows
            ]
        return [
            self._by_template(
                [
                    {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))},
                    {"role": "assistant", "content": row.get("output", "")},
                ]
            )
            for row in rows
        ]

    def _by_template(self, messages: Messages) -> Example:
        segments: list[tuple[str, bool]] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], add_generation_prompt=True)
            after = self._render(messages[: turn + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    f"the chat template of {self._tokenizer_name!r} writes earlier turns of a conversation differently "
                    "once later ones follow, so its answers cannot be told apart; use prompt alpaca"
                )
            answer, end, _ = after[len(before) :].partition(self.tokenizer.eos_token)
            segments += [(before[len(done) :], False), (answer + end, True)]
            done = before + answer + end
        return Example(segments, verbatim=True)

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            raise DataError(
                f"the chat template of {self._tokenizer_name!r} refuses a conversation ({error}): {messages!r:.200}"
            ) from error


def _answered(messages: Messages) -> Messages:
    # What ends with a question gets an empty answer, which a prediction takes the place of.
    return messages if messages[-1]["role"] == "assistant" else [*messages, {"role": "assistant", "content": ""}]


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
    for message in messages:
        if message["role"] == "system":
            opening = message["content"]
        elif message["role"] == "user":
            asked = message["content"]
        else:
            start = "\n\n" if segments else f"{opening}\n\n"
            segments += [(start + _alpaca_turn(asked), False), (message["content"], True)]
            asked = ""
    return Example(segments)

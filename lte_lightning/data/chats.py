"""Instructions and conversations of several forms, as lists of messages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lte_lightning.data.packaged import DataError

ROLES = ("system", "user", "assistant")
# ShareGPT's words, and those that its relatives use
_ROLE_OF = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Form:
    """The columns of a row.

    Args:
        columns: One of conversations, two of a prompt and its answer, or three of an instruction, its input and the
            answer.
        plain: A prompt and its answer stand as they are where there is no chat template.
    """

    columns: tuple[str, ...]
    plain: bool = False

    @property
    def is_conversation(self) -> bool:
        """Whether there is one column, of lists of messages."""
        return len(self.columns) == 1

    @property
    def answer(self) -> tuple[str, ...]:
        """The column of the answer, which rows to predict need not have."""
        return () if self.is_conversation else self.columns[-1:]

    def parts(self, row: dict[str, Any]) -> tuple[Any, str, Any]:
        """Returns a row's instruction, its input, and its answer, which may be missing."""
        prompt, *context, answer = self.columns
        return row[prompt], (row.get(context[0]) or "" if context else ""), row.get(answer) or ""

    def messages(self, row: dict[str, Any]) -> Messages:
        """Returns a row as a conversation.

        Raises:
            DataError: If it is no conversation.
        """
        if self.is_conversation:
            return conversation(row[self.columns[0]])
        asked, context, answer = self.parts(row)
        if not isinstance(asked, str):  # prompt and answer may be messages themselves
            return conversation(asked) + (conversation(answer) if answer else _answer(""))
        user = {"role": "user", "content": "\n\n".join(filter(None, (asked, context)))}
        return [user, *_answer(answer)]


ALPACA = Form(("instruction", "input", "output"))
FORMS = (Form(("messages",)), Form(("conversations",)), ALPACA, Form(("prompt", "completion"), plain=True))


def find_form(splits: Iterable[Sequence[str]]) -> Form:
    """Returns the form of a source's rows by the columns of its splits; Alpaca's if no form is recognised."""
    columns = [set(names) for names in splits]
    if {"instruction", "output"} in columns and not any("input" in names for names in columns):
        return Form(("instruction", "output"))
    # The first column decides: rows to predict have no answers, and a later check names missing columns.
    return next((form for form in FORMS if any(form.columns[0] in names for names in columns)), ALPACA)


def conversation(turns: Any) -> Messages:
    """Returns messages with a `role` and a `content`, from ShareGPT's `from` and `value` too.

    Args:
        turns: A list of messages, or a mapping of lists, as Hugging Face's older data sets have it.

    Raises:
        DataError: If it is no conversation; the caller puts row and column before the message.
    """
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not turns:
        why = " but a text: write lists of messages, as JSON lines do" if isinstance(turns, str) else ""
        raise DataError(f"{turns!r:.200}, not a conversation{why}")
    messages = []
    for turn in turns:
        known = turn if isinstance(turn, dict) else {}
        role, content = (
            known.get(theirs) if known.get(ours) is None else known[ours]
            for ours, theirs in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in _ROLE_OF or not isinstance(content, str):
            raise DataError(
                f"{turn!r:.200} is no message with a role ({', '.join(ROLES)}; ShareGPT: human, gpt) and a text "
                "as content"
            )
        messages.append({"role": _ROLE_OF[role], "content": content})
    return messages


def answered(messages: Messages) -> Messages:
    """Returns a conversation that ends with an empty answer, to be filled by a prediction."""
    return messages if messages[-1]["role"] == "assistant" else messages + _answer("")


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]

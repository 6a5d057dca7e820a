"""Instructions and conversations of several forms, as lists of messages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lte_lightning.data.packaged import DataError

ROLES = ("system", "user", "assistant")
# ShareGPT's words, and those of its relatives, in lower case
_ROLE_OF = {
    **{role: role for role in ROLES},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "ai", "model"), "assistant"),
}
_TOOLS = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")
SYSTEM = "system"  # a column of this name opens its row's conversation
Messages = list[dict[str, str]]
_SILENT = ("weight", "train")  # OpenAI's and axolotl's names: a 0 or false there takes a turn out of the loss


@dataclass(frozen=True)
class Form:
    """The columns of a row.

    Args:
        columns: One of conversations, two of a prompt and its answer, or three of an instruction, its input and the
            answer.
        plain: Without a chat template, a prompt and its answer are used unchanged.
        system: Whether rows have a column of system prompts, too.
    """

    columns: tuple[str, ...]
    plain: bool = False
    system: bool = False

    @property
    def read(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.columns, SYSTEM) if self.system else self.columns

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns whose values may be missing in a row."""
        return (*self.columns[1:], SYSTEM)

    @property
    def is_conversation(self) -> bool:
        """Whether there is one column, of lists of messages."""
        return len(self.columns) == 1

    @property
    def answer(self) -> tuple[str, ...]:
        """The column of the answer, which rows to predict need not have."""
        return () if self.is_conversation else self.columns[-1:]

    def with_system(self, splits: Iterable[Sequence[str]]) -> "Form":
        """Returns the form with the column of system prompts, if a split of a source has one."""
        return replace(self, system=SYSTEM not in self.columns and any(SYSTEM in names for names in splits))

    def parts(self, row: dict[str, Any]) -> tuple[Any, str, Any]:
        """Returns a row's instruction, its input, and its answer, which may be missing."""
        prompt, *context, answer = self.columns
        return row[prompt], (row.get(context[0]) or "" if context else ""), row.get(answer) or ""

    def messages(self, row: dict[str, Any]) -> Messages:
        """Returns a row as a conversation.

        Raises:
            DataError: If it is no conversation.
        """
        messages = self._turns(row)
        if (system := row.get(SYSTEM) if self.system else None) and messages[0]["role"] != SYSTEM:
            messages = [{"role": SYSTEM, "content": system}, *messages]
        return messages

    def _turns(self, row: dict[str, Any]) -> Messages:
        if self.is_conversation:
            return conversation(row[self.columns[0]])
        question, context, answer = self.parts(row)
        if not isinstance(question, str):  # prompt and answer may be messages themselves
            return conversation(question) + (conversation(answer) if answer else _answer(""))
        user = {"role": "user", "content": "\n\n".join(filter(None, (question, context)))}
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

    A content may come in parts (``{"type": "text", "text": ...}``). A turn that the data take out of the loss has
    `weight` 0.

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
        fields = turn if isinstance(turn, dict) else {}
        role, content = (
            fields.get(theirs) if fields.get(ours) is None else fields[ours]
            for ours, theirs in (("role", "from"), ("content", "value"))
        )
        content = _joined(content)
        word = role.strip().casefold() if isinstance(role, str) else ""
        known_role = _ROLE_OF.get(word)
        calls = fields.get("tool_calls") or fields.get("function_call") or word in _TOOLS
        if known_role is None or calls or not isinstance(content, str):
            why = "; calls of tools and their results are not read: leave such conversations out" if calls else ""
            raise DataError(
                f"{turn!r:.200} is no message with a role ({', '.join(ROLES)}; ShareGPT: human, gpt) and a text "
                f"as content{why}"
            )
        silent = any(fields.get(name) in (0, False) for name in _SILENT)
        messages.append({"role": known_role, "content": content} | ({"weight": "0"} if silent else {}))
    return messages


def carries_loss(messages: Messages, turn: int) -> bool:
    """Says whether a turn is an answer that carries loss.

    An answer does not if it opens the conversation, is empty before the last turn, or has weight 0. An empty last turn
    does, because it is the answer to predict.
    """
    message = messages[turn]
    if message["role"] != "assistant" or not turn or message.get("weight") == "0":
        return False
    return bool(message["content"].strip()) or turn == len(messages) - 1


def _joined(content: Any) -> Any:
    """Returns the text of a content that comes in parts of text; any other content as it is."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    return content


def answered(messages: Messages) -> Messages:
    """Returns a conversation that ends with an empty answer, to be filled by a prediction."""
    return messages if messages[-1]["role"] == "assistant" else messages + _answer("")


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]

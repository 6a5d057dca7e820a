"""A row of a prompt and its answers, as text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A row as text.

    Args:
        segments: The text in pieces, each with whether it is an answer, which carries the loss.
        verbatim: The text has its special tokens already (a chat template wrote it).
        shortened: The input was cut to fit.
    """

    segments: list[tuple[str, bool]]
    verbatim: bool = False
    shortened: bool = False

    @property
    def prompt(self) -> str:
        """Everything before the last answer."""
        return "".join(text for text, _ in self.segments[: self._last])

    @property
    def answer(self) -> str:
        """The last answer; empty if there is none."""
        return "".join(text for text, _ in self.segments[self._last : self._last + 1])

    @property
    def _last(self) -> int:
        return max((i for i, (_, is_answer) in enumerate(self.segments) if is_answer), default=len(self.segments))

"""Progress bars, tqdm's as in the libraries around us, and lines that do not tear them."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from huggingface_hub.utils import tqdm


class Bar(tqdm):
    """A bar on stderr while its work runs, in a terminal or a notebook only.

    Like Hugging Face's bars, it stays hidden with ``HF_HUB_DISABLE_PROGRESS_BARS=1`` or after
    ``huggingface_hub.utils.disable_progress_bars()``. tqdm's own ``TQDM_DISABLE`` decides before the terminal does.
    """

    monitor_interval = 0  # its thread would be copied into every process that starts under a bar

    def __init__(self, *args: Any, disable: bool = False, **options: Any) -> None:
        # None: only if the file is no terminal
        hidden = True if disable else bool(os.environ["TQDM_DISABLE"]) if "TQDM_DISABLE" in os.environ else None
        looks = {"disable": hidden, "leave": False, "miniters": 1} | _size(options.get("file") or sys.stderr)
        super().__init__(*args, **(looks | options))


def _size(file: TextIO) -> dict[str, Any]:
    try:
        known = min(os.get_terminal_size(file.fileno())) > 0
    except (AttributeError, OSError):  # OSError: no terminal, or a file in memory
        known = not file.isatty()
    if known:
        return {"dynamic_ncols": True}
    columns, rows = shutil.get_terminal_size()  # tqdm would take a size of 0 x 0 for no place at all
    return {"ncols": columns - 1, "nrows": rows - 1}


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line above the bars, by default to stdout."""
    file = file or sys.stdout
    Bar.write(line, file=file)
    file.flush()


@contextmanager
def lines_above_bars() -> Iterator[None]:
    """Writes warnings, and the lines that loggers send to the terminal, above the bars."""
    if not sys.stderr.isatty():  # no bars
        yield
        return
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values() if hasattr(one, "handlers"))]
    consoles = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") in (sys.stdout, sys.stderr)
    ]
    show = warnings.showwarning
    for handler, stream in consoles:
        handler.setStream(_Above(stream))
    warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = show
        for handler, stream in consoles:
            handler.setStream(stream)


class _Above:
    """A stream whose lines appear above the bars."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        Bar.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    Bar.write(text, file=file or sys.stderr, end="")

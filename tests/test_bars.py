"""Bars: where they are shown, and lines beside them."""

import contextlib
import io
import logging
import re
import warnings

import huggingface_hub.utils as hub
import pytest

from lte_lightning.bars import Bar, lines_above_bars, say
from lte_lightning.quiet import without_bars


def half() -> Bar:
    bar = Bar(total=2, desc="half")
    bar.update()
    bar.refresh()
    return bar


def test_a_bar_is_there_while_its_work_runs(terminal):
    with terminal.attached():
        bar = half()
        (line,) = terminal.lines()
        bar.close()
    assert re.match(r"half:  50%\|█+▌? +\| 1/2 \[00:0", line)
    assert len(line) == 99  # as wide as the terminal, but for the last column
    assert terminal.lines() == []


def test_lines_stand_above_the_bars(terminal):
    logger = logging.getLogger("a.library")
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminal.attached())
        logger.addHandler(handler := logging.StreamHandler())
        stack.callback(logger.removeHandler, handler)
        stack.enter_context(lines_above_bars())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        bar = half()
        say("said")
        logger.warning("logged")
        warnings.warn("warned", UserWarning, stacklevel=1)
        *above, below = terminal.lines()
        bar.close()
    assert above[:2] == ["said", "logged"]
    assert above[2].endswith("UserWarning: warned")
    assert below.startswith("half:  50%|")
    assert handler.stream is terminal
    assert terminal.lines() == above


@pytest.mark.parametrize("how", ["file", "TQDM_DISABLE", "disable", "hub", "without_bars"])
def test_where_no_bar_is_shown(how, terminal, monkeypatch):
    file = io.StringIO()
    if how == "TQDM_DISABLE":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    hidden = {"hub": hub.disable_progress_bars, "without_bars": without_bars}.get(how, contextlib.nullcontext)
    with terminal.attached(), hidden():
        list(Bar(range(2), disable=how == "disable", file=file if how == "file" else None))
    assert terminal.getvalue() + file.getvalue() == ""
    assert not hub.are_progress_bars_disabled()


def test_what_the_user_has_hidden_stays_hidden(recwarn):
    import datasets
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with without_bars():
            pass
        assert hub.are_progress_bars_disabled()
        assert datasets.are_progress_bars_disabled()
        assert not hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.enable_progress_bar()
        datasets.enable_progress_bars()
    assert not recwarn

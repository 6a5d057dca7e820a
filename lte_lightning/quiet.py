"""Hides the remarks and the progress bars of other libraries."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_remarks(*names: str) -> Iterator[None]:
    """Lets loggers say errors alone, and ignores warnings.

    Args:
        *names: The loggers'.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides progress bars, ours and those of the Hugging Face libraries."""
    import datasets
    import huggingface_hub.utils as hub
    from transformers.utils import logging as hf_logging

    hub_hides, datasets_hides = hub.are_progress_bars_disabled(), datasets.are_progress_bars_disabled()
    shown = hf_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library warns if the user's environment has decided
        hf_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if shown:
                hf_logging.enable_progress_bar()
            # transformers switches the hub's bars with its own, which may have differed
            (hub.disable_progress_bars if hub_hides else hub.enable_progress_bars)()
            if not datasets_hides:
                datasets.enable_progress_bars()

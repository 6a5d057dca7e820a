"""Completes commands and their options in a shell. argcomplete asks for this by environment variables."""

import argparse
import os
import re
from collections.abc import Callable
from importlib import import_module

TRAINING = "lte_lightning.cli.training"


def completion_requested() -> bool:
    """Says whether a shell asks for completions instead of running a command."""
    return "_ARGCOMPLETE" in os.environ


def complete(
    parser: argparse.ArgumentParser,
    commands: dict[str, str],
    run: Callable[[list[str]], object],
    help_of: Callable[[str], str],
) -> None:
    """Writes the completions of the typed line to where argcomplete's script reads them, and exits.

    Args:
        parser: Of the commands.
        commands: The module of each.
        run: Runs a command line; its jsonargparse parser answers argcomplete.
        help_of: Returns the help text of a command that trains.
    """
    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line[-1].isspace()) or words[1] not in commands:
        argcomplete.autocomplete(parser)
    module = import_module(commands[words[1]]) if commands[words[1]] != TRAINING else None
    start = int(os.environ.pop("_ARGCOMPLETE"))
    # argcomplete fails on Lightning's parser; its help text is cached and lists the options
    options = _options_in(help_of(words[1])) if module is None else None
    os.environ["_ARGCOMPLETE"] = str(start + 1)  # the command's name is no argument of it
    if options:
        argcomplete.autocomplete(options)
    if make_parser := getattr(module, "_parser", None):
        argcomplete.autocomplete(make_parser())
    run([words[1]])


def _options_in(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in dict.fromkeys(re.findall(r"^ *(--[\w.]+)", text, re.MULTILINE)):
        parser.add_argument(option)
    return parser

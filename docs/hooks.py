"""Makes a page of the site for each command, of what its parser says: MkDocs calls `on_config` and `on_files`."""

import contextlib
import io
import os
import sys
from typing import Any
from unittest import mock

from lte_lightning.cli import COMMANDS, TRAINING, main

WIDTH = "100"


def on_config(config: Any) -> Any:
    """Puts the pages of the commands in the navigation."""
    pages = [{f"lte {name}": f"commands/{name}.md"} for name in COMMANDS]
    config.nav = [
        {title: pages if target == "commands" else target for title, target in item.items()} for item in config.nav
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the commands."""
    from mkdocs.structure.files import File

    for name in COMMANDS:
        files.append(File.generated(config, f"commands/{name}.md", content=page(name)))
    return files


def page(name: str) -> str:
    """Returns the page of a command: its help, and for one that trains, the options of every task and data module."""
    module, summary = COMMANDS[name]
    parts = [f"# lte {name}\n\n{summary[0].upper()}{summary[1:]}.\n", _fenced(name, "--help")]
    if module == TRAINING:
        for option, package in (("model", "tasks"), ("data", "data")):
            for cls in _classes(package):
                parts += [f"## `--{option} {cls}`\n", _fenced(name, f"--{option}.help", cls)]
    return "\n".join(parts)


def _classes(package: str) -> list[str]:
    exported = __import__(f"lte_lightning.{package}", fromlist=["__all__"])
    made = {name: getattr(exported, name) for name in exported.__all__}
    return [name for name, value in made.items() if isinstance(value, type) and not issubclass(value, Exception)]


def _fenced(*words: str) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=WIDTH),
        mock.patch.object(sys, "argv", ["lte", *words]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main()
    if not printed.getvalue():
        raise RuntimeError(f"lte {' '.join(words)} printed no help")
    return f"```text\n{printed.getvalue().rstrip()}\n```\n"

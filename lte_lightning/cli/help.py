"""Help texts of the commands, made once: the parser of a fit imports torch and Lightning, which takes seconds."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lte_lightning.cache import cache_folder

PACKAGE = Path(__file__).parents[1]
WRITTEN_BY = ("docstring-parser", "jsonargparse", "lightning", "omegaconf", "torch", "transformers")


def show_help(command: str, make: Callable[[], object]) -> None:
    """Prints a command's help. The text is kept until this package, what it is made with, or the terminal changes.

    Args:
        command: Its name.
        make: Prints the help and exits.
    """
    folder, key = cache_folder(), _key()
    file = folder / f"help-{command}.txt" if folder else None
    with contextlib.suppress(OSError):  # the first line is the key, the rest the text
        if file and file.exists():
            kept, _, text = file.read_text(encoding="utf-8").partition("\n")
            if kept == key:
                print(text, end="")
                return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            make()
    except SystemExit as stop:
        if stop.code:
            raise
    print(printed.getvalue(), end="")
    with contextlib.suppress(OSError):
        if file:
            staging = file.with_suffix(f".{os.getpid()}")
            staging.write_text(f"{key}\n{printed.getvalue()}", encoding="utf-8")
            staging.replace(file)


def _key() -> str:
    states = [
        (str(path), status.st_mtime_ns, status.st_size) for path in PACKAGE.rglob("*.py") if (status := path.stat())
    ]
    made_with = [sys.version, *map(_version, WRITTEN_BY)]
    terminal = (Path(sys.argv[0]).name, shutil.get_terminal_size().columns)
    return hashlib.sha256(repr((sorted(states), made_with, terminal)).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # an optional one
        return ""

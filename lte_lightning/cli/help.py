"""Cached help texts of the commands: the parser of a fit imports torch and Lightning, which takes seconds."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lte_lightning.cache import cache_folder

PACKAGE = Path(__file__).parents[1]
MOST = 8  # texts of a command
WRITTEN_BY = ("docstring-parser", "jsonargparse", "lightning", "omegaconf", "torch", "transformers")


def show_help(command: str, make: Callable[[], object]) -> None:
    """Prints a command's help. The text is cached until this package or a package behind its parser changes.

    Each program's name and each width of a terminal has a text of its own.

    Args:
        command: Its name.
        make: Prints the help and exits.
    """
    folder, key = cache_folder(), _key()
    looks = f"{Path(sys.argv[0]).name} {shutil.get_terminal_size().columns}"
    file = folder / f"help-{command}.txt" if folder else None
    texts: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a damaged file is made again
        cached = json.loads(file.read_text(encoding="utf-8")) if file else {}
        texts = dict(cached["texts"]) if cached.get("key") == key else {}
    if looks in texts:
        print(texts[looks], end="")
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
            recent = dict([*texts.items(), (looks, printed.getvalue())][-MOST:])
            staging.write_text(json.dumps({"key": key, "texts": recent}), encoding="utf-8")
            staging.replace(file)


def _key() -> str:
    states = [
        (str(path), status.st_mtime_ns, status.st_size) for path in PACKAGE.rglob("*.py") if (status := path.stat())
    ]
    made_with = [sys.version, *map(_version, WRITTEN_BY)]
    return hashlib.sha256(repr((sorted(states), made_with)).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # an optional one
        return ""

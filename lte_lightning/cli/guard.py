"""Guards against configurations from others: checks them before reading, and hides the environment from them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lte_lightning.documents import read_yaml
from lte_lightning.errors import UserError, meant_path
from lte_lightning.files import read_text
from lte_lightning.store import STORE, shown

MOST_CHARACTERS = 1_000_000  # of an option whose references are followed
MODE = "omegaconf+"  # of the parser: options may refer to each other, across files


class CheckedLoader:
    """Reads a configuration after checking its size and depth.

    Args:
        load: Makes the values of a text.
    """

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load

    def __call__(self, text: str) -> Any:
        """Returns the values of a text.

        Raises:
            DocumentError: If the text is not YAML, or has a value that cannot be parsed.
        """
        return read_yaml(text, self._load)


def guard_configurations() -> None:
    """Checks every configuration before it is read, and hides the environment from it.

    A configuration may refer to other options (``${data.task}``). What it would take from the environment could be a
    password, and would be kept in the run's files: LTE_CONFIG_ENV=1 allows it.
    """
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # it makes its loader when it is first used
    load = get_loader(MODE)

    if not isinstance(load, CheckedLoader):
        set_loader(MODE, CheckedLoader(load), (yaml.YAMLError,))
    # omegaconf 2.4 has a new name for it
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    register("oc.env", _environment, replace=True)


def check_files(words: Sequence[str]) -> None:
    """Checks the configurations that a command line names, so that errors name the file.

    Raises:
        UserError: If one is missing, no text in UTF-8 or no YAML.
    """
    named = [word for flag, word in pairwise(words) if flag in ("-c", "--config")]
    named += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for file in map(Path, named):
        if file.suffix in (".yaml", ".yml", ".json") and not file.exists():  # a configuration may be given as text
            raise UserError(f"no file {file}{meant_path(file)}")
        if not file.is_file():
            continue
        try:
            read_yaml(read_text(file))
        except yaml.YAMLError as error:
            raise UserError(f"{file}: {error}") from error


def check_passwords(options: Any, path: str = "") -> None:
    """Refuses addresses with a password: a run's files keep all options.

    Raises:
        UserError: If one has a password, which the message does not show.
    """
    inner = options.items() if isinstance(options, dict) else enumerate(options) if isinstance(options, list) else ()
    for key, value in inner:
        check_passwords(value, f"{path}.{key}" if path else str(key))
    if isinstance(options, str) and path != STORE and re.search(r"://[^\s/@:]*:[^\s/@]+@", options):
        raise UserError(
            f"{path} is {shown(options)}, and what *** stands for would be kept in the run's files: leave it out, and "
            "give it as the address's client takes it from the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD) or "
            "from ~/.netrc"
        )


def _environment(name: str, *default: Any) -> Any:
    if os.environ.get("LTE_CONFIG_ENV") != "1":
        raise UserError(
            f"a configuration reads the environment variable {name} (${{oc.env:{name}}}); if the file is yours, set "
            "LTE_CONFIG_ENV=1, or give the value on the command line"
        )
    if name not in os.environ and not default:
        raise UserError(f"a configuration reads the environment variable {name}, which is not set")
    return os.environ.get(name, *default)


def check_references(options: dict[str, Any]) -> None:
    """Refuses options whose references to each other would expand to an enormous text; other errors come later.

    Raises:
        UserError: If one would have more than a million characters.
    """
    sizes: dict[tuple[str, ...], int] = {}

    def size(path: tuple[str, ...], value: Any) -> int:
        if path not in sizes:
            sizes[path] = 0  # a reference to itself is not this check's concern
            if isinstance(value, dict):
                sizes[path] = sum(size((*path, str(key)), inner) for key, inner in value.items())
            elif isinstance(value, list):
                sizes[path] = sum(size((*path, str(i)), inner) for i, inner in enumerate(value))
            else:
                text = str(value)
                targets = [_target(path, dots, name) for dots, name in re.findall(r"\$\{(\.*)([\w.\[\]]+)\}", text)]
                sizes[path] = len(text) + sum(size(target, _find(options, target)) for target in targets)
            if sizes[path] > MOST_CHARACTERS:
                raise UserError(
                    f"{'.'.join(path)} has more than {MOST_CHARACTERS:,} characters once its references are resolved"
                )
        return sizes[path]

    for key, value in options.items():
        size((str(key),), value)


def _target(path: tuple[str, ...], dots: str, name: str) -> tuple[str, ...]:
    return (*(path[: -len(dots)] if dots else ()), *name.replace("[", ".").replace("]", "").split("."))


def _find(options: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if isinstance(options, list):
            options = options[int(name)] if name.isdecimal() and int(name) < len(options) else None
        else:
            options = options.get(name) if isinstance(options, dict) else None
    return options


@contextmanager
def references() -> Iterator[None]:
    """Turns the errors of options that refer to others into one line."""
    try:
        yield
    except (OmegaConfBaseException, RecursionError) as error:
        if isinstance(error.__cause__ or error.__context__, UserError):
            raise
        cause = str(error).splitlines()[0] if str(error) else "they are nested too deep"
        where = getattr(error, "full_key", None)
        raise UserError(f"the option {where} refers to others: {cause}" if where else f"references: {cause}") from error

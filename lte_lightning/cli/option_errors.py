"""Errors of options: the cause and the nearest name, without the whole usage."""

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lte_lightning.cli.guard import check_files, check_references, references
from lte_lightning.core.model.config import LteConfig
from lte_lightning.errors import meant
from lte_lightning.lazy import load_all
from lte_lightning.options import ShortErrors, cause
from lte_lightning.shipped import resolve_options
from lte_lightning.tasks.base import LteModule

load_all("lte_lightning.tasks", "lte_lightning.data")  # jsonargparse knows the classes that are imported


class LteParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with shorter errors, which knows the configurations that come with the package.

    It tells given options from those that links derive.

    Attributes:
        before_links: The options read last, with defaults, before links replaced any.
    """

    before_links = Namespace()

    def _parse_common(self, cfg: Namespace, *more: Any, **how: Any) -> Namespace:
        # jsonargparse gives no other access to values before links. Other calls read files, classes and commands
        if "subcommand" not in cfg and not how.keys() & {"skip_required", "fail_no_subcommand"}:
            LteParser.before_links = cfg.clone()
        with references():
            if "${" in str(cfg):
                check_references(cfg.as_dict())
            return super()._parse_common(cfg, *more, **how)

    def in_files(self, words: Sequence[str]) -> Namespace:
        """Returns the options that the configurations of a command line set, without defaults."""
        files = config_files(words)
        command = [word for word in words[:1] if not word.startswith("-")]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self.parse_args([*command, *(f"--config={file}" for file in files)], defaults=False)
        except SystemExit:  # files that are whole only together with the rest
            pass
        return LteParser.before_links

    def parse_args(self, args: Iterable[str] | None = None, *more: Any, **options: Any) -> Any:
        """Parses; ``--config lte:NAME`` is a file of the package."""
        words = resolve_options(sys.argv[1:] if args is None else list(args))
        check_files(words)
        return super().parse_args(words, *more, **options)

    def explain(self, message: str, options: Iterable[str]) -> str:
        """Returns what is wrong, as the module's `explain` does."""
        return explain(message, options)


def config_files(words: Sequence[str]) -> list[str]:
    """Returns the configurations that a command line names."""
    files = [word for flag, word in pairwise(words) if flag in ("-c", "--config")]
    return files + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Cuts jsonargparse's account of an error down to its cause, and suggests the nearest name.

    Args:
        message: Of jsonargparse.
        options: The parser's options, ``--trainer.devices`` and the like.
    """
    if match := re.search(r"(?:Option|Key|[Kk]ey|Group key) '([^']+)' is not (?:accepted|expected)", message):
        name = match[1].split(".")[-1]
        return f"{_key_in(message)}unknown name {match[1]!r}{_elsewhere(name) or _hint(name, _names())}"
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"{_key_in(message)}there is no class {match[1]}{_hint(match[1], _classes())}"
    return cause(message, options)


def _key_in(message: str) -> str:
    match = re.search(r'Parser key "([^"]+)"', message)
    return f"{match[1]}: " if match else ""


def _hint(name: str, known: Iterable[str]) -> str:
    return meant(name, known, "; did you mean {}?")


def _subclasses(base: type[object]) -> list[type[object]]:
    ours = [cls for cls in base.__subclasses__() if cls.__module__.startswith("lte_lightning.")]
    return ours + [deeper for cls in ours for deeper in _subclasses(cls)]


def _classes() -> list[str]:
    return [cls.__name__ for cls in _subclasses(LteModule) + _subclasses(LightningDataModule)]


def _elsewhere(name: str) -> str:
    """Returns a remark on which part or class has the name, if another has it."""
    for part, base in (("data", LightningDataModule), ("model", LteModule)):
        if classes := sorted(cls.__name__ for cls in _subclasses(base) if name in _parameters(cls)):
            return f"; it is --{part}.{name} of {', '.join(classes)}"
    return ""


def _parameters(cls: type) -> set[str]:
    """Returns the names that a class takes: its own and those that it passes on, without those that it sets itself."""
    return set(ArgumentParser().add_class_arguments(cls))


def _names() -> set[str]:
    classes: list[type[object]] = [LteConfig, *_subclasses(LteModule), *_subclasses(LightningDataModule)]
    return {name for cls in classes for name in _parameters(cls)}

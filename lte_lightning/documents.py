"""Limits on YAML and JSON from others, checked before the text is parsed into values."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_CHARACTERS = 4_000_000
MOST_NODES = 100_000  # aliases followed
DEEPEST = 60
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DocumentError(yaml.YAMLError):
    """A text that is no YAML, has a key twice, or holds a NUL character."""


class LimitError(DocumentError):
    """A text that contains itself, is too deep, or too large once its aliases are followed."""


@dataclass
class _Open:
    """A list or mapping that is being read."""

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    children: int = 0
    keys: set[str] = field(default_factory=set)


def _load(text: str) -> Any:
    return yaml.load(text, _LOADER)


def read_yaml(text: str, load: Callable[[str], Any] = _load) -> Any:
    """Returns the values of a text from anybody.

    Args:
        text: The text.
        load: Makes the values.

    Raises:
        DocumentError: If it is no YAML, or has a value that is none of its kind (a month 13, a number of 5,000 digits).
        LimitError: If it contains itself, is too deep or too large.
    """
    check_yaml(text)
    try:
        return load(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(str(error)) from error
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's for !!bool x, !!int "" and !!timestamp x
        raise DocumentError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error


def check_yaml(text: str) -> None:
    """Reads through a text without making anything of it.

    Raises:
        DocumentError: If it is no YAML, has a key twice, of which YAML takes the last, or holds a NUL character.
        LimitError: If it contains itself, is too deep or too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise LimitError(f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
    try:
        _walk(text, _LOADER)
    except DocumentError:
        raise
    except yaml.YAMLError:
        try:
            _walk(text, yaml.SafeLoader)  # slower, and tells better what is wrong
        except yaml.YAMLError as error:
            raise DocumentError(" ".join(str(error).replace('in "<unicode string>", ', "").split())) from error


def _walk(text: str, loader: Any) -> None:
    open_: list[_Open] = [_Open(None, False)]
    sizes: dict[str, int] = {}
    words: dict[str, str] = {}
    for event in yaml.parse(text, loader):
        _step(event, open_, sizes, words)


def _step(event: yaml.Event, open_: list[_Open], sizes: dict[str, int], words: dict[str, str]) -> None:
    line = event.start_mark.line + 1
    if isinstance(event, yaml.CollectionEndEvent):
        closed = open_.pop()
        if closed.anchor:
            sizes[closed.anchor] = closed.nodes
        _add(open_[-1], closed.nodes, line)
        return
    if not isinstance(event, yaml.NodeEvent):
        return
    inner = open_[-1]
    is_key, inner.children = inner.is_mapping and inner.children % 2 == 0, inner.children + 1
    if isinstance(event, yaml.AliasEvent):
        if event.anchor in [each.anchor for each in open_]:
            raise LimitError(f"*{event.anchor} stands within what it stands for (line {line})")
        if is_key and event.anchor in words:
            _add_key(inner, words[event.anchor], line)
        _add(inner, sizes.get(event.anchor, 1), line)
    elif isinstance(event, yaml.ScalarEvent):
        if "\0" in event.value:  # files and programs take it for an end, or fail at it
            raise DocumentError(f"{event.value!r} holds a NUL character (line {line})")
        if is_key and event.value != "<<":
            _add_key(inner, event.value, line)
        if event.anchor:
            sizes[event.anchor], words[event.anchor] = 1, event.value
        _add(inner, 1, line)
    else:
        open_.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        if len(open_) > DEEPEST:
            raise LimitError(f"it lies {DEEPEST} levels deep (line {line}); nest less")


def _add_key(inner: _Open, key: str, line: int) -> None:
    if key in inner.keys:
        raise DocumentError(f"the key {key!r} is there twice (line {line})")
    inner.keys.add(key)


def _add(inner: _Open, nodes: int, line: int) -> None:
    inner.nodes += nodes
    if inner.nodes > MOST_NODES:
        raise LimitError(f"with its aliases followed it has more than {MOST_NODES} parts (line {line})")


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(rb"[\[\]{}]")


def check_rows(lines: Iterable[bytes]) -> None:
    """Checks rows in JSON for what crashes pyarrow's reader: some thousand levels, and a row that is null.

    Args:
        lines: Of the file. A string never goes on in the next.

    Raises:
        LimitError: If it is too deep.
        DocumentError: If a row is null.
    """
    depth = 0
    for number, line in enumerate(lines, 1):
        if not depth and line.lstrip().startswith(b"null"):
            raise DocumentError(f"line {number} is null, and no row")
        opened = line.count(b"[") + line.count(b"{")
        if depth + opened <= DEEPEST and opened == line.count(b"]") + line.count(b"}"):
            continue  # nearly every row
        for bracket in _BRACKET.findall(_STRING.sub(b"", line)):
            depth = depth + 1 if bracket in b"[{" else max(depth - 1, 0)
            if depth > DEEPEST:
                raise LimitError(f"it lies more than {DEEPEST} levels deep (line {number})")

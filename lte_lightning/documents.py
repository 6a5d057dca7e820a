"""YAML from anybody: limits on what a text may become once its aliases are followed, before anything is made of it."""

from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_CHARACTERS = 4_000_000
MOST_NODES = 100_000  # aliases followed
DEEPEST = 60


class DocumentError(yaml.YAMLError):
    """A text that is no YAML of ours."""


@dataclass
class _Open:
    """A list or mapping that is being read."""

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    children: int = 0
    keys: set[str] = field(default_factory=set)


def check_yaml(text: str) -> None:
    """Reads through a text without making anything of it.

    Raises:
        DocumentError: If it is no YAML, has a key twice (of which YAML takes the last), contains itself, or is too deep
            or too large; with the line.
    """
    if len(text) > MOST_CHARACTERS:
        raise DocumentError(f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    open_: list[_Open] = [_Open(None, False)]
    sizes: dict[str, int] = {}
    try:
        for event in yaml.parse(text, loader):
            _step(event, open_, sizes)
    except DocumentError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        raise DocumentError(" ".join(str(error).split())) from error


def _step(event: yaml.Event, open_: list[_Open], sizes: dict[str, int]) -> None:
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
        if event.anchor in [one.anchor for one in open_]:
            raise DocumentError(f"line {line}: *{event.anchor} stands within what it stands for")
        _add(inner, sizes.get(event.anchor, 1), line)
    elif isinstance(event, yaml.ScalarEvent):
        if is_key and event.value != "<<":
            if event.value in inner.keys:
                raise DocumentError(f"line {line}: the key {event.value!r} is there twice")
            inner.keys.add(event.value)
        if event.anchor:
            sizes[event.anchor] = 1
        _add(inner, 1, line)
    else:
        open_.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        if len(open_) > DEEPEST:
            raise DocumentError(f"line {line}: it lies {DEEPEST} levels deep; nest less")


def _add(inner: _Open, nodes: int, line: int) -> None:
    inner.nodes += nodes
    if inner.nodes > MOST_NODES:
        raise DocumentError(f"line {line}: with its aliases followed it has more than {MOST_NODES} parts")

"""Checksums of configurations, by which a sweep notices that their values have changed since it began."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.documents import read_yaml
from lte_lightning.sweep.points import Sweep


def files_of(sweep: Sweep) -> dict[str, Path]:
    """Returns the configurations and the files that they include, by their paths relative to the sweep file."""
    files: set[Path] = set()
    for file in {file for block in sweep.variants.values() for file in block.configs}:
        _add_with_parts(Path(file), files)
    return dict(sorted((os.path.relpath(file, sweep.path.parent), file) for file in files))


def checksum(file: Path) -> str:
    """Returns the checksum of the values of a YAML file. Comments, quotes and the order of keys do not change it."""
    return checksums(file)[0]


def checksums(file: Path) -> tuple[str, str]:
    """Returns the checksums of the values of a YAML file, and of its bytes. Earlier versions stored the latter.

    They are the same for a file that is not YAML.
    """
    as_written = file.read_bytes()
    try:
        content = json.dumps(_content(as_written), sort_keys=True, default=str).encode()
    except (TypeError, ValueError, yaml.YAMLError):  # keys of several types; not YAML
        content = as_written
    return hashlib.sha256(content).hexdigest(), hashlib.sha256(as_written).hexdigest()


def _add_with_parts(file: Path, files: set[Path]) -> None:
    if file in files:
        return
    files.add(file)
    try:
        waiting = [_content(file.read_bytes())]
    except (OSError, ValueError, yaml.YAMLError):
        return  # the fits will say so
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and value.endswith((".yaml", ".yml")):
            part = Path(os.path.normpath(file.parent / value))
            if part.is_file():
                _add_with_parts(part, files)


def _content(as_written: bytes) -> Any:
    """Parses YAML.

    Raises:
        ValueError, yaml.YAMLError: If it is not YAML, contains itself, or is too large with its aliases followed.
    """
    return read_yaml(as_written.decode("utf-8-sig"))

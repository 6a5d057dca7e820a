"""The folder of a saved model: what its files are called, which format they have, and how they are found."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.experts import MODES
from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class

LAYOUT_VERSION = 1
CONFIG_FILE = "lte_config.json"
ROUTERS_FILE = "lte_routers.safetensors"
# How from_pretrained is told where on the hub something lies: every file of a model is to come from there.
HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class LayoutError(UserError):
    """A folder is not a saved LTE model that this version can read."""


def is_lte(source: str | os.PathLike[str], **hub: Any) -> bool:
    """Says whether a folder or hub id holds a model written by `save_pretrained`."""
    return find(source, CONFIG_FILE, **hub) is not None


def read_lte_config(source: str | os.PathLike[str], **hub: Any) -> LteConfig:
    """Returns how a saved model was converted.

    Raises:
        LayoutError: If the source is not an LTE model, or its description is damaged.
    """
    description = read_description(source, **hub)
    try:
        if description["mode"] not in MODES:
            raise ValueError(f"unknown mode {description['mode']!r}")
        _require_selector(source, description["lte"]["selector"])
        return LteConfig(**description["lte"])
    except LayoutError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"{CONFIG_FILE} of {source} is damaged: {error}") from error


def _require_selector(source: str | os.PathLike[str], name: str) -> None:
    try:
        selector_class(name)
    except UserError as error:
        raise LayoutError(f"{source} was converted with a selector that is not known here: {error}") from error


def read_description(source: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """Returns the contents of ``lte_config.json``.

    Raises:
        LayoutError: If there is none, or it is of another version.
    """
    path = require_file(source, CONFIG_FILE, **hub)
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        version = description["layout_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LayoutError(f"{path} is damaged: {error!r}") from error
    if version != LAYOUT_VERSION:
        raise LayoutError(
            f"{source} has layout version {version!r}, this lte-lightning reads {LAYOUT_VERSION}; "
            "install the version that wrote it, or export the model again"
        )
    return description


def read_routers(source: str | os.PathLike[str], **hub: Any) -> dict[str, torch.Tensor]:
    """Returns the contents of ``lte_routers.safetensors``: by the names of the FFNs and of their selectors' tensors.

    Raises:
        LayoutError: If there is none, or it is damaged.
    """
    path = require_file(source, ROUTERS_FILE, **hub)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"{path} is damaged: {error}") from error


def find(source: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    """Returns a file of a folder or of a repository, None if there is no such file, or no such repository."""
    if Path(source).is_dir():  # asked about one, transformers would look at the hub's settings, and talk about them
        local = Path(source, hub.get("subfolder") or "", name)
        return local if local.is_file() else None
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def require_file(source: str | os.PathLike[str], name: str, **hub: Any) -> Path:
    """Returns a file of a saved LTE model.

    Raises:
        LayoutError: If there is no such file.
    """
    found = find(source, name, **hub)
    if found is None:
        raise LayoutError(
            f"{source} has no {name}, so it is not a saved LTE model; load a plain model with transformers and "
            "convert() it"
        )
    return found

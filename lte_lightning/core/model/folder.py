"""The folder of a saved model: the names and format of its files, and the functions that find them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.experts import MODES
from lte_lightning.errors import UserError, meant_path
from lte_lightning.files import abridged, read_json
from lte_lightning.selection import selector_class

LAYOUT_VERSION = 1
QUANTIZED_VERSION = "quantized-1"  # of a folder with quantised weights, which only this package reads
CONFIG_FILE = "lte_config.json"
ROUTERS_FILE = "lte_routers.safetensors"
QUANTIZED_FILE = "lte_quantized.safetensors"
# Options of from_pretrained that name a place on the hub. Every file of a model must come from the same place.
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


def find_model(source: str | os.PathLike[str]) -> str:
    """Returns a model's place: the named folder, a run folder's ``model/``, or the named hub id.

    Raises:
        LayoutError: If it is a path and there is no such folder, or the folder holds no model.
        TypeError: If it is no name at all.
    """
    try:
        path, name = Path(source), str(source)
    except TypeError as error:
        raise TypeError(f"name a model by its folder or its id on the hub, not by {source!r}") from error
    if path.is_dir():
        for inner in _places(path):
            if any((inner / file).is_file() for file in ("config.json", CONFIG_FILE)):
                return str(inner)
        raise LayoutError(f"{name} holds no model: it has no config.json, and no model/config.json as a run has")
    if path.exists():
        raise LayoutError(f"{name} is a file; name the folder of a model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # otherwise it is a hub id
        raise LayoutError(f"no folder {name}{meant_path(path)}")
    return name


def find_saved(source: str | os.PathLike[str]) -> Path:
    """Returns the folder of a saved LTE model on this machine: the named folder, or a run's ``model/``.

    Raises:
        LayoutError: If there is no such folder, or it holds a plain model.
    """
    for folder in _places(Path(source)):
        if folder.is_dir() and is_lte(folder):
            return folder
    near = "" if Path(source).exists() else meant_path(source)
    raise LayoutError(f"{source} is no folder of a saved LTE model, nor of a run that has one (RUN/model){near}")


def _places(folder: Path) -> tuple[Path, Path]:
    """Returns the places where a folder may hold a model: the folder itself, and a run's ``model/``."""
    return folder, folder / "model"


@contextmanager
def said_of(source: object) -> Iterator[None]:
    """Turns any error of transformers about a folder into one line.

    Raises:
        LayoutError: For any error except a lack of memory.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:400] or type(error).__name__
        raise LayoutError(f"{source} cannot be loaded: {why}") from error


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
        LayoutError: If there is no such file, or it has another format.
    """
    path = require_file(source, CONFIG_FILE, **hub)
    try:
        description = read_json(path)
    except (UserError, OSError) as error:
        raise LayoutError(str(error)) from error
    if "layout_version" not in description:
        raise LayoutError(f"{path} is damaged: it has no layout_version")
    if (version := description["layout_version"]) not in (LAYOUT_VERSION, QUANTIZED_VERSION):
        raise LayoutError(
            f"{source} has layout version {abridged(version)}, this lte-lightning reads {LAYOUT_VERSION}; "
            "install the version that wrote it, or export the model again"
        )
    if version == QUANTIZED_VERSION and not isinstance(description.get("quantized"), dict):
        raise LayoutError(f"{path} is damaged: it does not say how the weights are quantised")
    return description


def read_routers(source: str | os.PathLike[str], **hub: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of ``lte_routers.safetensors``, by the names of the FFNs and of their selectors' tensors.

    Raises:
        LayoutError: If there is no such file, or it is damaged.
    """
    path = require_file(source, ROUTERS_FILE, **hub)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"{path} is damaged: {error}") from error


def stored_weights(source: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> dict[str, torch.Tensor]:
    """Returns the weights as the files hold them, mapped into memory and not yet read.

    Args:
        source: A folder, or a hub id.
        variant: The variant that ``from_pretrained`` takes.
        **hub: `HUB_OPTIONS`.
    """
    return {key: value for file in weight_files(source, variant, **hub) for key, value in _read(file).items()}


def weight_files(source: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> list[Path]:
    """Returns the files of the weights, all within the folder; none if there are none. Arguments as `stored_weights`.

    Raises:
        LayoutError: If the index of several files is damaged, or names a file of another folder.
    """
    for kind in ("model.safetensors", "pytorch_model.bin", QUANTIZED_FILE):
        for name in (kind, f"{kind}.index.json"):
            stem, _, ending = name.rpartition(".")
            path = find(source, f"{stem}.{variant}.{ending}" if variant else name, **hub)
            if path is not None:
                return [path] if name == kind else [require_file(source, shard, **hub) for shard in _shards(path)]
    return []


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{abridged(name)} is not in its folder")
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"{index} names the files of the weights, and is damaged: {error}") from error
    return names


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    content: dict[str, torch.Tensor] = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    return content


def find(source: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    """Returns a file of a folder or of a repository; None if there is no such file or no such repository."""
    if Path(source).is_dir():  # here transformers would look at the hub's settings, and log remarks about them
        local = Path(source, hub.get("subfolder") or "", name)
        return local if local.is_file() else None
    file = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if file is None else Path(file)


def require_file(source: str | os.PathLike[str], name: str, **hub: Any) -> Path:
    """Returns a file of a saved LTE model.

    Raises:
        LayoutError: If there is no such file.
    """
    file = find(source, name, **hub)
    if file is None and not Path(source).is_dir() and find(source, "config.json", **hub) is None:
        raise LayoutError(
            f"no folder {source}{meant_path(source)}, and no model of that name in the cache or on the hub"
        )
    if file is None:
        raise LayoutError(
            f"{source} has no {name}, so it is not a saved LTE model; load a plain model with transformers and "
            "convert() it"
        )
    return file

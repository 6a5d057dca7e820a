"""Saved models: an ordinary Hugging Face folder, and beside it the routers.

The folder holds the (permuted) weights under their original names, so anything that reads Hugging Face folders reads it
as the dense model; ``lte_config.json`` and ``lte_routers.safetensors`` hold what makes it an LTE model.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, expert_ffns, lte_config, plain, require_expert_ffns, set_mode
from lte_lightning.core.model.experts import MODES
from lte_lightning.core.model.storage import set_backend
from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import BACKENDS, Backend

LAYOUT_VERSION = 1
CONFIG_FILE = "lte_config.json"
ROUTERS_FILE = "lte_routers.safetensors"


class LayoutError(UserError):
    """A folder is not a saved LTE model that this version can read."""


def save_pretrained(
    model: PreTrainedModel, folder: str | os.PathLike[str], about: dict[str, Any] | None = None, **kwargs: Any
) -> Path:
    """Writes a converted model as a Hugging Face folder with its routers.

    The folder appears whole or not at all. One that holds a saved LTE model already is replaced; any other non-empty
    folder (a plain model's, too) is left alone.

    Args:
        model: A converted model.
        folder: Where to.
        about: Further facts for ``lte_config.json`` (plain JSON types); a run keeps its stage and figures here.
        **kwargs: Passed to the model's own ``save_pretrained``.

    Returns:
        The folder.

    Raises:
        UserError: If the model was not converted, or the folder holds something else.
    """
    ffns = require_expert_ffns(model)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} exists and is not a saved LTE model; choose another folder or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "layout_version": LAYOUT_VERSION,
        "model_type": model.config.model_type,
        "mode": next(iter(ffns.values())).mode,
        "lte": asdict(lte_config(model)),
        "about": about or {},
    }
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with plain(model):
            model.save_pretrained(staging, **kwargs)
        save_file(
            {
                f"{name}.{key}": value.detach().contiguous()
                for name, ffn in ffns.items()
                for key, value in ffn.selector.state_dict().items()
            },
            staging / ROUTERS_FILE,
        )
        (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        staging.chmod(0o755)
        _replace(folder, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _replace(folder: Path, staging: Path) -> None:
    """Moves ``staging`` to ``folder``; what was there goes only once the new one is in its place."""
    if not folder.exists():
        staging.rename(folder)
        return
    old = staging.with_name(f"{staging.name}-old")
    folder.rename(old)
    try:
        staging.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def from_pretrained(
    source: str | os.PathLike[str], auto_class: Any = None, backend: Backend = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Loads a model written by `save_pretrained`, experts and routers in place, in the mode it was saved in.

    The routers take the type of the weights they decide on.

    Args:
        source: A folder, or a hub id.
        auto_class: How to build the plain model, e.g. ``AutoModelForCausalLM``; the saved architecture if not given.
        backend: What computes the selected experts in hard mode without gradients; see `set_backend`.
        **kwargs: Passed to the plain model's ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Raises:
        UserError: If there is no such backend.
        LayoutError: If the source is not an LTE model, is of another layout version, or its files disagree.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    config = read_lte_config(source)
    mode = read_description(source)["mode"]
    hf_config = AutoConfig.from_pretrained(source)
    if auto_class is None:
        architecture = (hf_config.architectures or ["none"])[0]
        auto_class = getattr(transformers, architecture, None)
        if auto_class is None:
            raise LayoutError(f"{source} was saved as {architecture!r}, which transformers lacks; pass auto_class")
    model: PreTrainedModel = auto_class.from_pretrained(source, **kwargs)
    convert(model, config, group=False)
    _load_routers(model, _file(source, ROUTERS_FILE))
    for ffn in expert_ffns(model).values():
        for parameter in ffn.selector.parameters():  # not buffers: a calibrated level is not to be rounded
            parameter.data = parameter.data.to(ffn.up.weight.dtype)
    set_mode(model, mode)
    set_backend(model, backend)
    return model


def is_lte(source: str | os.PathLike[str]) -> bool:
    """Says whether a folder or hub id holds a model written by `save_pretrained`."""
    return _find(source, CONFIG_FILE) is not None


def read_lte_config(source: str | os.PathLike[str]) -> LteConfig:
    """Returns how a saved model was converted.

    Raises:
        LayoutError: If the source is not an LTE model, or its description is damaged.
    """
    description = read_description(source)
    try:
        if description["mode"] not in MODES:
            raise ValueError(f"unknown mode {description['mode']!r}")
        return LteConfig(**description["lte"])
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"{CONFIG_FILE} of {source} is damaged: {error}") from error


def read_description(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of ``lte_config.json``.

    Raises:
        LayoutError: If there is none, or it is of another version.
    """
    path = _file(source, CONFIG_FILE)
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


def _find(source: str | os.PathLike[str], name: str) -> Path | None:
    found = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _file(source: str | os.PathLike[str], name: str) -> Path:
    found = _find(source, name)
    if found is None:
        raise LayoutError(
            f"{source} has no {name}, so it is not a saved LTE model; load a plain model with transformers and "
            "convert() it"
        )
    return found


def _load_routers(model: PreTrainedModel, path: Path) -> None:
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"{path} is damaged: {error}") from error
    for name, ffn in require_expert_ffns(model).items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): stored.pop(key) for key in list(stored) if key.startswith(prefix)}
        try:
            ffn.selector.load_state_dict(own)
        except RuntimeError as error:
            raise LayoutError(f"{path} does not fit the model at {name}: {error}") from error
    if stored:
        raise LayoutError(f"{path} has weights that no layer takes: {', '.join(sorted(stored)[:3])}")

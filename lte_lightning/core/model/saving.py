"""Save a model as an ordinary Hugging Face folder, with the routers beside it.

The folder holds the (permuted) weights under their original names. So any reader of Hugging Face folders reads it as
the dense model. ``lte_config.json`` and ``lte_routers.safetensors`` make it an LTE model.
"""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from lte_lightning.core.model.card import README, is_ours, licence, public_name, write_card
from lte_lightning.core.model.checks import listed, require_dense
from lte_lightning.core.model.digest import FORMAT, digest
from lte_lightning.core.model.exact import is_part
from lte_lightning.core.model.experts import expert_ffns, require_expert_ffns
from lte_lightning.core.model.folder import (
    CONFIG_FILE,
    LAYOUT_VERSION,
    QUANTIZED_FILE,
    QUANTIZED_VERSION,
    ROUTERS_FILE,
    find,
    stored_weights,
)
from lte_lightning.core.model.names import plain_names
from lte_lightning.core.model.quantize import write_quantized
from lte_lightning.core.model.quantized import is_quantized
from lte_lightning.core.model.settings import settings
from lte_lightning.core.model.swap import lte_config, plain
from lte_lightning.core.model.thresholds import THRESHOLDS_FILE, save_kept_table
from lte_lightning.errors import UserError
from lte_lightning.files import exchange, sync, sync_all, writing
from lte_lightning.selection import selector_class


def save_pretrained(
    model: PreTrainedModel, folder: str | os.PathLike[str], about: dict[str, Any] | None = None, **kwargs: Any
) -> Path:
    """Writes a converted model as a Hugging Face folder with its routers.

    The folder appears whole or not at all. It replaces a folder that already holds a saved LTE model. Any other
    non-empty folder (a plain model's, too) stays as it is.

    Args:
        model: A converted model.
        folder: The folder to write.
        about: Further facts for ``lte_config.json`` (plain JSON types); a run keeps its stage and results here.
        **kwargs: Passed to the plain model's ``save_pretrained`` (``max_shard_size``, ...). A ``state_dict`` must hold
            the routers, too, as ``model.state_dict()`` does.

    Returns:
        The folder.

    Raises:
        UserError: If the model was not converted, the folder holds something else, or the saved model could not be
            loaded again.
    """
    require_expert_ffns(model)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} exists and is not a saved LTE model; choose another folder or empty it")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(model, staging, about, **kwargs)
            exchange(staging, folder)  # the previous folder is at the staging one's name then
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def save_into(model: PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    """Writes a converted model into a folder, beside the files that others keep there.

    Args:
        model: A converted model.
        folder: The folder to write, which is created if there is none.
        **kwargs: Those of `save_pretrained`.

    Returns:
        The folder.

    Raises:
        UserError: If the saved model could not be loaded again, or the folder is a file.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is saved in a folder")
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        with writing(folder):
            _write(model, staging, None, **kwargs)
        written = sorted(path.name for path in staging.iterdir())
        # The description is removed first and written last, so that nobody takes a half-written folder for a model.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / THRESHOLDS_FILE).unlink(missing_ok=True)
        for path in folder.iterdir():
            if re.fullmatch(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?|{QUANTIZED_FILE}", path.name):
                path.unlink()
        if not is_ours(folder / README):
            written.remove(README)
        for name in sorted(written, key=lambda name: name == CONFIG_FILE):
            if name == CONFIG_FILE:
                sync(folder)  # the described files are on the disk before the description
            (staging / name).replace(folder / name)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):  # a refusal leaves nothing behind
            folder.rmdir()
    return folder


def _permit(folder: Path) -> None:
    """Gives a folder and its files the permissions of the user's new files, because safetensors makes them private."""
    os.umask(mask := os.umask(0o077))  # only setting the mask returns it
    folder.chmod(0o777 & ~mask)
    for file in filter(Path.is_file, folder.rglob("*")):
        file.chmod(0o666 & ~mask)


def _write(
    model: PreTrainedModel,
    folder: Path,
    about: dict[str, Any] | None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> None:
    ffns = require_expert_ffns(model)
    if kwargs.get("distributed_checkpoint"):
        raise UserError("distributed_checkpoint writes no folder that others can load; leave it out")
    if is_quantized(model):
        if state_dict is not None or kwargs:
            raise UserError(
                f"the weights of a quantised model are saved as they are, in one file; leave out "
                f"{', '.join(['state_dict'] * (state_dict is not None) + list(kwargs))}"
            )
        _write_quantized(model, folder, about)
        return
    given = model.state_dict() if state_dict is None else state_dict
    require_dense(given)
    state = plain_names(ffns, given)
    if any(map(is_part, state.values())):
        raise UserError(
            f"the weights of this {type(model).__name__} are sharded over devices; gather them in every process, "
            "state_dict = accelerator.get_state_dict(model), and save with state_dict=state_dict in the first"
        )
    if offloaded := [key for key, value in state.items() if value.is_meta]:
        raise UserError(
            f"weights are not in memory ({listed(offloaded)}), for device_map offloaded them or the model was made "
            "without values; to save the model, load it without offload_folder"
        )
    routers = _take_routers(model, state)
    _require_loadable(model, state)
    with plain(model):
        model.save_pretrained(folder, state_dict=state, **kwargs)
    _complete(model, folder, routers, about, kwargs.get("variant"))


def _write_quantized(model: PreTrainedModel, folder: Path, about: dict[str, Any] | None) -> None:
    quantized = write_quantized(model, folder / QUANTIZED_FILE)
    model.config.architectures = [type(model).__name__]  # as transformers itself does
    config = copy.deepcopy(model.config)
    # Loaders that do not know this method refuse the folder by its name.
    config.quantization_config = {"quant_method": "lte_lightning", "kind": quantized["kind"]}
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    routers = {
        f"{name}.{key}": value.detach().contiguous()
        for name, ffn in expert_ffns(model).items()
        for key, value in ffn.selector.state_dict().items()
    }
    _complete(model, folder, routers, about, quantized=quantized)


def _complete(
    model: PreTrainedModel,
    folder: Path,
    routers: dict[str, torch.Tensor],
    about: dict[str, Any] | None,
    variant: str | None = None,
    quantized: dict[str, Any] | None = None,
) -> None:
    """Writes the routers and the description into a folder that has the weights, and waits until all is on the disk."""
    save_file(routers, folder / ROUTERS_FILE)
    config = lte_config(model)
    description = {
        "layout_version": QUANTIZED_VERSION if quantized else LAYOUT_VERSION,
        **({"quantized": quantized} if quantized else {}),
        "model_type": model.config.model_type,
        "mode": next(iter(expert_ffns(model).values())).mode,
        "lte": asdict(config),
        "selector": asdict(selector_class(config.selector).describe(config.expert_size, config.target_sparsity)),
        "about": about or {},
        "base": _base(model),
        "transformers": transformers.__version__,
        "digest": {
            "format": FORMAT,
            "config": settings(AutoConfig.from_pretrained(folder)),
            "weights": digest(stored_weights(folder, variant)),
            "routers": digest(routers),
        },
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    save_kept_table(model, folder, description)
    write_card(folder, description, model.config)
    _permit(folder)
    sync_all(folder)  # without this, a power cut may leave the folder with empty files


def _base(model: PreTrainedModel) -> dict[str, str | None]:
    """Returns the base model, ``model`` and ``license``; for a saved model, those that its folder describes."""
    if (kept := model.__dict__.get("lte_base")) is not None:
        return dict(kept)
    source = getattr(model.config, "_name_or_path", None)
    try:
        own_card = find(source, README, local_files_only=True) if source else None
    except OSError:  # the folder is gone by now, and its name is no hub id
        own_card = None
    return {"model": public_name(source), "license": licence(own_card) if own_card else None}


def _take_routers(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moves the selectors' tensors out of a state dict, and gives them the names of the routers' file."""
    routers, missing = {}, []
    for name, ffn in expert_ffns(model).items():
        for key, expected in ffn.selector.state_dict().items():
            value = state.pop(f"{name}.selector.{key}", None)
            if value is None:
                missing.append(f"{name}.selector.{key}")
            elif value.shape != expected.shape:
                raise UserError(
                    f"{name}.selector.{key} of the state dict is {list(value.shape)}, and the model's is "
                    f"{list(expected.shape)}"
                )
            else:
                _require_type(f"{name}.selector.{key}", value, expected)
                routers[f"{name}.{key}"] = value.detach().clone(memory_format=torch.contiguous_format)
    if missing:
        raise UserError(
            f"the state dict has no routers ({listed(missing)}), and those of the model may belong to other weights; "
            "give model.state_dict(), or none"
        )
    return routers


def _require_loadable(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Refuses weights that do not fit a fresh plain model of the same class and configuration.

    It finds adapters, quantised weights, parametrizations and changed heads, for example. Hugging Face would load such
    a folder with random weights in their place.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        fresh = type(model)(copy.deepcopy(model.config))
    expected, ignored = fresh.state_dict(), set(fresh._keys_to_ignore_on_save or ())
    tied = getattr(fresh, "all_tied_weights_keys", {})
    present = set(state) | ignored
    present |= {key for key, twin in tied.items() if twin in present} | {tied[key] for key in tied if key in present}
    name = type(model).__name__
    if unknown := [key for key in state if key not in expected and key not in ignored]:
        hint = ""
        if any("lora_" in key or "base_layer" in key for key in unknown):
            hint = "; merge the adapters first (merge_and_unload(), or merge_lora)"
        raise UserError(f"a {name} of this configuration has no weights {listed(unknown)}{hint}")
    # For a base model alone, the code that loads it decides whether transformers makes a pooler.
    bare = model.base_model is model
    if missing := [key for key in expected if key not in present and not (bare and key.startswith("pooler."))]:
        raise UserError(f"weights are missing that a {name} of this configuration has: {listed(missing)}")
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            shape = list(expected[key].shape)
            raise UserError(f"{key} is {list(value.shape)}, and that of a {name} of this configuration is {shape}")
        if key in expected:
            _require_type(key, value, expected[key])


def _require_type(name: str, value: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuses whole numbers in place of fractions, and floating-point types of 8 bits, which nothing computes in."""
    if value.is_floating_point() != expected.is_floating_point() or (value.is_floating_point() and value.itemsize < 2):
        raise UserError(f"{name} is of type {value.dtype}, and a model of that could not be loaded again")

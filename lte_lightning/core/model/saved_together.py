"""Refuse weights, routers and a configuration that were not saved together."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lte_lightning.core.model.checks import listed
from lte_lightning.core.model.digest import FORMAT, differing, digest
from lte_lightning.core.model.folder import CONFIG_FILE, ROUTERS_FILE, LayoutError
from lte_lightning.core.model.settings import changed

CHOOSE_FILE = frozenset({"use_safetensors", "gguf_file", "state_dict"})
"""Options with which transformers may take other weights than those of the files that are checked."""


def require_own(
    description: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    routers: Mapping[str, torch.Tensor],
    config: PreTrainedConfig,
    source: object,
    prefix: str = "",
) -> None:
    """Refuses weights, routers and a configuration that were not saved together.

    Args:
        description: The contents of ``lte_config.json``. An old description without a digest passes.
        weights: The folder's weights, or some of them, as they are stored.
        routers: The folder's routers.
        config: The folder's ``config.json``.
        source: Their origin, for the message.
        prefix: The base model's prefix, which a name may have or lack.

    Raises:
        LayoutError: If they were not saved together, or this version does not know the digest's format.
    """
    entries = description.get("digest")
    if entries is None:
        return

    try:
        if entries["format"] != FORMAT:
            raise LayoutError(
                f"{CONFIG_FILE} of {source} has a digest of format {entries['format']!r}, this lte-lightning reads "
                f"{FORMAT}; install the version that wrote it"
            )
        others = changed(entries.get("config", {}), config, description.get("transformers"))
        wrong_routers = differing(entries["routers"], routers)
        wrong_weights = differing(_short(entries["weights"], prefix), _short(weights, prefix))
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise LayoutError(f"the digest in {CONFIG_FILE} of {source} is damaged: {error!r}") from error
    way_out = f'Put it back; if you meant to change it, take "digest" out of {CONFIG_FILE} and measure the model again'
    if others:
        why = f"config.json is not what was saved ({listed(others)}), and describes another function"
        raise LayoutError(f"{source}: {why}. {way_out}")
    for wrong, what, other in (
        (wrong_routers, ROUTERS_FILE, "weights"),
        (wrong_weights, "the weights' file", "routers"),
    ):
        if wrong:
            raise LayoutError(
                f"{source}: {what} is not what was saved with its {other} ({listed(wrong)} differ), so routers and "
                f"weights are of different models. {way_out}"
            )


def _short(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}."): value for name, value in entries.items()}


def require_loaded(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Refuses a model whose layers hold other weights than the files that are checked.

    An option of transformers (``use_safetensors``), or a file beside the weights, may bring such weights.

    Args:
        model: The plain model, as transformers loaded it.
        weights: The folder's weights, as they are stored.
        source: Their origin, for the message.

    Raises:
        LayoutError: If it does.
    """
    layers = {name: p for name, p in model.named_parameters() if re.search(r"\.\d+\.", name) and not p.is_meta}
    held, stored = _short(layers, model.base_model_prefix), _short(weights, model.base_model_prefix)
    if wrong := differing(digest({name: value for name, value in stored.items() if name in held}), held):
        raise LayoutError(
            f"transformers loads other weights for {source} ({listed(wrong)}) than the file that this package checks; "
            "leave options that choose a file out, and keep files of other models in other folders"
        )

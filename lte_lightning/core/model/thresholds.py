"""The knob of a saved model: a table of thresholds by sparsity, and `set_sparsity`, which applies one of its settings.

`core.routing.knob` makes the table on calibration rows. The folder keeps it in ``lte_thresholds.json``.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lte_lightning.core.model.experts import require_expert_ffns
from lte_lightning.core.model.folder import LayoutError, find
from lte_lightning.errors import UserError
from lte_lightning.files import abridged, read_json, whole_file

THRESHOLDS_FILE = "lte_thresholds.json"
FORMAT = 1
_KEPT = "lte_thresholds"  # the model's attribute

logger = logging.getLogger("lte_lightning")


@dataclass(frozen=True)
class Setting:
    """The thresholds of one sparsity.

    Args:
        sparsity: The requested share of FFN neurons that do not run.
        reached: The share that did not run on the calibration rows.
        thresholds: The threshold of each layer, in (0, 1).
        per_layer: Sparsity of each layer on the calibration rows.
    """

    sparsity: float
    reached: float
    thresholds: tuple[float, ...]
    per_layer: tuple[float, ...]


@dataclass(frozen=True)
class ThresholdTable:
    """The sparsities that a model can be set to.

    Args:
        settings: In ascending order of sparsity.
        layers: How the sparsity was shared out among the layers: ``free``, ``equal`` or ``least-loss``.
        tokens: Tokens of the calibration rows.
        rows: The origin of the calibration rows.
        chosen: The model's sparsity when it was saved; None for the threshold that it was trained with.
    """

    settings: tuple[Setting, ...]
    layers: str
    tokens: int
    rows: str = ""
    chosen: float | None = None

    def at(self, sparsity: float) -> Setting:
        """Returns the setting of a sparsity. Between two settings it interpolates the thresholds' logits linearly.

        Raises:
            UserError: If the sparsity lies outside of the table.
        """
        low, high = self.settings[0].sparsity, self.settings[-1].sparsity
        if not low <= sparsity <= high:  # NaN, too
            there = f"only {low:g}" if low == high else f"{low:g} to {high:g}"
            raise UserError(
                f"sparsity is {sparsity}, and the model was calibrated for {there}; calibrate it for more: "
                "lte calibrate FOLDER --sparsity 0.3,0.5,0.9"
            )
        above = next(setting for setting in self.settings if setting.sparsity >= sparsity)
        if above.sparsity == sparsity:
            return above
        below = [setting for setting in self.settings if setting.sparsity < sparsity][-1]
        share = (sparsity - below.sparsity) / (above.sparsity - below.sparsity)

        def between(one: float, other: float) -> float:
            return (1.0 - share) * one + share * other

        return Setting(
            sparsity,
            between(below.reached, above.reached),
            tuple(torch.lerp(_logits(below), _logits(above), share).sigmoid().tolist()),
            tuple(map(between, below.per_layer, above.per_layer)),
        )


def set_sparsity(model: nn.Module, sparsity: float | None) -> float | None:
    """Sets a saved model's sparsity by the table of thresholds that ``lte calibrate`` put into its folder.

    It writes thresholds in place on the device. So a compiled model is not compiled again, and a captured CUDA graph
    follows at its next replay.

    Args:
        model: In mode ``hard``, loaded from a folder with a table, or calibrated.
        sparsity: Share of the FFN neurons that shall not run. Between two entries of the table it interpolates
            thresholds, and the log says so. None for the threshold that the model was trained with.

    Returns:
        The sparsity of these thresholds on the calibration rows (between two entries, the expected sparsity); None for
        None.

    Raises:
        UserError: If the model has no table, the sparsity lies outside of it, or every expert runs in the model's mode.
    """
    ffns = require_expert_ffns(model)
    if sparsity is None:
        for ffn in ffns.values():
            ffn.threshold = ffn.trained_threshold
        _set_chosen(model, None)
        return None
    table = require_settings(model, [sparsity])
    setting = table.at(sparsity)
    if setting not in table.settings:
        near = [each.sparsity for each in table.settings]
        below, above = max(s for s in near if s < sparsity), min(s for s in near if s > sparsity)
        logger.info("sparsity %g is interpolated between %g and %g, which were calibrated", sparsity, below, above)
    for ffn, threshold in zip(ffns.values(), setting.thresholds, strict=True):
        ffn.threshold = threshold
    _set_chosen(model, sparsity)
    return setting.reached


def require_settings(model: nn.Module, sparsities: Sequence[float]) -> ThresholdTable:
    """Returns a model's table of thresholds, after a check that `set_sparsity` takes all of these sparsities.

    Raises:
        UserError: For the reasons of `set_sparsity`.
    """
    table = kept_table(model)
    if table is None:
        raise UserError(
            "this model has no table of thresholds, which a sparsity is looked up in; make one by `lte calibrate "
            "FOLDER`, and load the folder again"
        )
    for sparsity in sparsities:
        table.at(sparsity)
    modes = {ffn.mode for ffn in require_expert_ffns(model).values()}
    if modes != {"hard"}:
        raise UserError(
            f"this model is in mode {'/'.join(sorted(modes))!r}, where every expert runs whatever its threshold; "
            "set_mode(model, 'hard') first"
        )
    return table


def kept_table(model: nn.Module) -> ThresholdTable | None:
    """Returns the table that a model was loaded or calibrated with, if there is one."""
    return model.__dict__.get(_KEPT, (None, None))[0]


def keep_table(model: nn.Module, table: ThresholdTable | None, owner: str | None = None) -> None:
    """Gives a model its table.

    Args:
        model: A converted model.
        table: The table; None removes it.
        owner: The `tensors_of` the table's folder; None for the current weights.

    Raises:
        UserError: If the table is for another number of layers.
    """
    model.__dict__.pop(_KEPT, None)
    if table is None:
        return
    layers = len(require_expert_ffns(model))
    if any(len(setting.thresholds) != layers for setting in table.settings):
        raise UserError(f"the table of thresholds is of {len(table.settings[0].thresholds)} layers, the model {layers}")
    model.__dict__[_KEPT] = (table, owner)


def owner_of(description: Mapping[str, Any]) -> str | None:
    """Returns the digest of a folder's weights, routers and settings (``lte_config.json``); None for old folders."""
    digest = description.get("digest")
    return None if digest is None else hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()


def tensors_of(description: Mapping[str, Any]) -> str | None:
    """Returns the digest of a folder's weights and routers alone, which stays the same when the folder is saved again.

    Another version may note more settings than the version that saved the folder first.
    """
    digest = description.get("digest")
    return owner_of({"digest": {key: digest.get(key) for key in ("weights", "routers")}} if digest else {})


def write_table(table: ThresholdTable, folder: Path, description: Mapping[str, Any]) -> None:
    """Writes a model's table into its folder."""
    content = {"format": FORMAT, "owner": owner_of(description), **asdict(table)}
    with whole_file(folder / THRESHOLDS_FILE) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def save_kept_table(model: nn.Module, folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the table that a model was loaded with into a new folder, unless its weights have changed since.

    Raises:
        UserError: If a model without a table, or whose table is out of date, is set to other thresholds than its own.
    """
    table, owner = model.__dict__.get(_KEPT, (None, None))
    stale = owner is not None and owner != tensors_of(description)
    if table is None or stale:
        moved = [ffn.threshold for ffn in require_expert_ffns(model).values() if ffn.threshold != ffn.trained_threshold]
        if moved:
            raise UserError(
                f"{len(moved)} layers have another threshold than the model was trained at (the first {moved[0]:.4f}), "
                "and no table that belongs to these weights says so; set_sparsity(model, None) before saving"
            )
    if table is None:
        return
    if stale:
        logger.warning(
            "the weights have changed since the model's thresholds were calibrated: they are not saved with them; "
            "run lte calibrate %s",
            folder,
        )
        return
    write_table(table, folder, description)


def read_table(source: str | os.PathLike[str], description: Mapping[str, Any], **hub: Any) -> ThresholdTable | None:
    """Returns the table of a saved model; None if it has none.

    Args:
        source: A folder, or a hub id.
        description: The contents of its ``lte_config.json``.
        **hub: `folder.HUB_OPTIONS`.

    Raises:
        LayoutError: If the table is damaged, has another format, or belongs to another model.
    """
    path = find(source, THRESHOLDS_FILE, **hub)
    if path is None:
        return None
    again = f"run lte calibrate {source} again, or delete the file"
    try:
        content = read_json(path)
        written, owner = content.pop("format"), content.pop("owner")
        if written != FORMAT:
            raise LayoutError(f"{path} has format {written!r}, this lte-lightning reads {FORMAT}; {again}")
        settings = tuple(_read_setting(each) for each in content.pop("settings"))
        table = ThresholdTable(settings, **content)
        if not settings or [s.sparsity for s in settings] != sorted({s.sparsity for s in settings}):
            raise ValueError("its sparsities do not ascend")
        if table.chosen is not None:
            table.at(table.chosen)
    except LayoutError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise LayoutError(f"{path} is damaged ({error}); {again}") from error
    if owner != owner_of(description):
        raise LayoutError(f"{path} was calibrated for other weights or routers than this folder's; {again}")
    return table


def _read_setting(values: Mapping[str, Any]) -> Setting:
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    setting = Setting(**made)
    numbers = (setting.sparsity, setting.reached, *setting.per_layer, *setting.thresholds)
    if wrong := [number for number in numbers if not isinstance(number, int | float) or isinstance(number, bool)]:
        raise TypeError(f"{abridged(wrong[0])} is no number")
    if len(setting.per_layer) != len(setting.thresholds):
        raise ValueError(f"it has {len(setting.thresholds)} thresholds and {len(setting.per_layer)} sparsities")
    if not all(0.0 <= float(share) <= 1.0 for share in (setting.sparsity, setting.reached, *setting.per_layer)):
        raise ValueError("a sparsity is no share")
    if not all(0.0 <= float(threshold) <= 1.0 for threshold in setting.thresholds):
        raise ValueError("a threshold is not between 0 and 1")
    return setting


def _set_chosen(model: nn.Module, sparsity: float | None) -> None:
    table, owner = model.__dict__.get(_KEPT, (None, None))
    if table is not None:
        model.__dict__[_KEPT] = (replace(table, chosen=sparsity), owner)


def _logits(setting: Setting) -> torch.Tensor:
    return torch.logit(torch.tensor(setting.thresholds, dtype=torch.float64), eps=1e-12)

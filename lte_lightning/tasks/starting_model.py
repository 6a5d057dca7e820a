"""The model that a fit starts from: a plain one that is converted, or one that an earlier run has saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from lte_lightning.core.accounting.budget import meet_budget
from lte_lightning.core.model.checks import listed, require_complete, require_finite, require_sound_routers
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, lte_config, restore
from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.folder import find_model, is_lte, read_description
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.core.model.names import plain_names
from lte_lightning.errors import UserError
from lte_lightning.quiet import without_bars

_STAGE_OF_MODE = {"dense": "dense", "soft": "router", "hard": "expert"}


def load(
    auto_class: Any,
    source: str,
    arguments: dict[str, Any],
    config: LteConfig | None,
    seed: int,
    activation: str | None = None,
    layers: int | None = None,
    from_scratch: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads a model and gives it experts, in train mode.

    Args:
        auto_class: The task's class of models.
        source: A plain model's folder or hub id, or a saved LTE model's.
        arguments: The task's arguments of ``from_pretrained``.
        config: Experts and routers; None for those of a saved LTE model, or the defaults.
        seed: The defaults' seed, and that of random weights.
        activation: Swap a plain model's activation for this one.
        layers: Keep only the first ones of a plain model.
        from_scratch: Draw random weights for a plain model, of the source's configuration with these changes.

    Returns:
        The model, ungrouped if it is in the dense stage, and what is known about it: ``stage`` and ``measured``.

    Raises:
        UserError: If it cannot be loaded, or was routed with another configuration.
    """
    about: dict[str, Any] = {}
    try:
        find_model(source)
    except UserError as error:
        raise UserError(f"cannot load the model {source!r}: {error}") from error
    arguments = arguments | {"dtype": torch.float32}  # a half-precision checkpoint would train in half precision
    with _quiet():
        try:
            if activation is not None:
                arguments |= {_activation_key(source, activation): activation}
            if is_lte(source):
                if layers or from_scratch is not None:
                    _require_as_saved(source, layers, from_scratch)
                model = from_pretrained(source, auto_class, backend="dense-mask", **arguments)
                description = read_description(source)
                # one saved from Python says no more than its mode
                about = {"stage": _STAGE_OF_MODE[description["mode"]]} | description["about"]
            else:
                model = _load_plain(auto_class, source, arguments, layers, from_scratch, seed)
        except UserError:
            raise
        # RuntimeError: a head of another size; SafetensorError: a file that was cut short
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load the model {source!r}: {error}") from error
    if not expert_ffns(model):
        give_experts(model, config or LteConfig(seed=seed))
    elif config is not None:
        if about.get("stage", "dense") == "dense":
            give_experts(model, config)
        else:
            _require_same(source, lte_config(model), _targeted(model, config))
    return model.train(), about  # Hugging Face loads in eval mode, and Lightning would keep it so


def _load_plain(
    auto_class: Any,
    source: str,
    arguments: dict[str, Any],
    layers: int | None,
    from_scratch: dict[str, Any] | None,
    seed: int,
) -> PreTrainedModel:
    if layers is None and from_scratch is None:
        return _read_plain(auto_class, source, **arguments)
    dtype = arguments["dtype"]
    config = AutoConfig.from_pretrained(source, **{key: value for key, value in arguments.items() if key != "dtype"})
    if from_scratch is not None:
        unknown = ", ".join(key for key in from_scratch if not hasattr(config, key))
        if unknown:
            raise UserError(f"from_scratch: the configuration of {source} has no {unknown}")
        kept = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "model_type")}
        config = type(config)(**kept | from_scratch)
    if layers is not None:
        _keep_layers(config, source, layers)
    if from_scratch is None:
        return _read_plain(auto_class, source, cut=layers is not None, config=config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class.from_config(config, dtype=dtype)


def _read_plain(auto_class: Any, source: str, cut: bool = False, **arguments: Any) -> PreTrainedModel:
    model, info = auto_class.from_pretrained(source, output_loading_info=True, **arguments)
    require_complete(model, info, source, cut)
    require_finite(dict(model.named_parameters()), source)
    return model


def check_checkpoint(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Refuses a checkpoint that lacks weights of a module, has others, or holds values that are not finite.

    Args:
        module: What the checkpoint is for, its model converted as the checkpoint says.
        state: Its state dict.

    Raises:
        UserError: If it does.
    """
    ffns = expert_ffns(module)
    wanted, given = (set(plain_names(ffns, each)) for each in (module.state_dict(), state))
    if missing := sorted(wanted - given):
        raise UserError(f"the checkpoint lacks weights: {listed(missing)}")
    if others := sorted(given - wanted):
        raise UserError(f"the checkpoint has weights that the model does not take: {listed(others)}")
    require_sound_routers(state, "the checkpoint")


def _activation_key(source: str, wanted: str) -> str:
    config = AutoConfig.from_pretrained(source)
    names = ("hidden_act", "activation_function", "hidden_activation", "activation")
    key = next((name for name in names if isinstance(getattr(config, name, None), str)), None)
    if key is None:
        raise UserError(f"the configuration of {source} names no activation to swap ({', '.join(names)})")
    if is_lte(source) and getattr(config, key) != wanted:
        raise UserError(
            f"{source} was trained with activation {getattr(config, key)!r}, and activation says {wanted!r}; leave "
            "model.activation out, or start from the plain model"
        )
    return key


def _keep_layers(config: PreTrainedConfig, source: str, layers: int) -> None:
    names = [name for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers") if hasattr(config, name)]
    most = min(getattr(config, name) for name in names)
    if not 1 <= layers <= most:
        raise UserError(f"layers is {layers}, but {source} has {most}")
    for name in names:
        setattr(config, name, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _require_as_saved(source: str, layers: int | None, from_scratch: dict[str, Any] | None) -> None:
    config = AutoConfig.from_pretrained(source)
    if layers and config.num_hidden_layers != layers:
        raise UserError(
            f"{source} was saved with {config.num_hidden_layers} layers, and layers is {layers}; leave model.layers out"
        )
    for key, value in (from_scratch or {}).items():
        if getattr(config, key, None) != value:
            raise UserError(
                f"{source} was saved with {key} {getattr(config, key, None)!r}, and from_scratch says {value!r}; leave "
                "model.from_scratch out"
            )


def give_experts(model: PreTrainedModel, config: LteConfig) -> None:
    """Converts a model for training: new experts and routers, its neurons not yet grouped."""
    if is_sharded(model):
        raise UserError("the checkpoint has other experts than model.lte; resume with the options of its fit")
    if expert_ffns(model):
        restore(model)
    convert(model, _targeted(model, config), group=False)


def _targeted(model: PreTrainedModel, config: LteConfig) -> LteConfig:
    if config.budget is None:
        return config
    targeted = meet_budget(model, config)
    name, share = config.budget
    rank_zero_info(f"target_{name} {share:g} of the dense model's is a sparsity of {targeted.target_sparsity:.4f}")
    return targeted


def _require_same(source: str, saved: LteConfig, wanted: LteConfig) -> None:
    old, new = asdict(saved), asdict(replace(wanted, seed=saved.seed))
    changed = ", ".join(f"{key}: {old[key]} there, {new[key]} here" for key in old if old[key] != new[key])
    if changed:
        raise UserError(f"{source} was routed with another configuration ({changed}); leave model.lte out to keep it")


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers reports the new head as missing weights, which every fine-tuning has
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)

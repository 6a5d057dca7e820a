"""Options without effect: refuse those that would change the meaning of a command, name the others."""

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lte_lightning.callbacks.plan import StagePlan
from lte_lightning.core.model.config import LteConfig
from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class
from lte_lightning.store import find_run, keeps_run, mlflow_store, read_run_file, shown
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.evaluation import STAGES
from lte_lightning.tasks.selector_training import ROUTER_OPTIONS
from lte_lightning.trainer import is_first_process

MODEL, LTE = "model.init_args.", "model.init_args.lte."
# Options of training, on which a trained model's output does not depend
TRAINING = (
    *(f"{MODEL}{name}_weight" for name in ("efficiency", "separability", "balance")),
    *(f"{MODEL}separability_{name}" for name in ("start", "end", "epsilon")),
    *(f"{MODEL}{name}" for name in (*ROUTER_OPTIONS, "freeze_routers", "gradient_checkpointing", "seed", "samples")),
    f"{LTE}seed",
)


VARIABLE = "MLFLOW_TRACKING_URI"  # of the environment
LINKED = {
    **{key: "set seed_everything" for key in ("stages.seed", "data.init_args.seed", "model.init_args.seed")},
    "data.init_args.tokenizer": "it is the model's: set model.init_from or model.pretrained",
    "model.init_args.task": "it is the data's: set data.task",
}
DEFAULTS = {
    name: parameter.default
    for made in (LteModule, LteConfig, StagePlan)
    for name, parameter in inspect.signature(made).parameters.items()
}


@dataclass(frozen=True)
class GivenOptions:
    """The options that a user gave, on the command line or in configurations.

    Args:
        everything: All options, with defaults.
        in_files: Options that the configurations set.
        words: The command line.
    """

    everything: Namespace
    in_files: Namespace
    words: Sequence[str]

    def typed(self, key: str) -> bool:
        """Says whether an option stands on the command line."""
        names = [word.partition("=")[0].lstrip("-") for word in self.words if word.startswith("--")]
        return any(f"{_name(key)}.".startswith(f"{_name(name)}.") for name in names)

    def options(self, config: Namespace) -> dict[str, Any]:
        """Returns the options that the user gave, by the names under which the command uses them."""
        in_files = dict(_leaves(self.in_files, config))
        return {
            key: value
            for key, value in _leaves(self.everything, config)
            if key in in_files or self.typed(key) or _changes(key, value)
        }


def check_ineffective(given: GivenOptions, config: Namespace, command: str | None) -> None:
    """Compares the given options with those that a command will use, and names every option without effect.

    Args:
        given: The given options.
        config: The options that the command will use, after links and a checkpoint's own.
        command: ``fit``, ``test`` and so on; None for that of a parser without commands.

    Raises:
        UserError: If another value than the given one is used, and that makes a difference.
    """
    fits, options = command in (None, "fit"), given.options(config)
    # Links replace values, and checkpoints those of the model
    own = [key for key in options if key in LINKED or (config.get("ckpt_path") and key.startswith("model."))]
    replaced = {key: options[key] for key in own if _differs(options[key], _used(config, key))}
    for key, value in replaced.items():
        if fits or key not in TRAINING:
            _refuse(key, value, config)
    unread = dict.fromkeys(replaced, "the checkpoint's value is used")
    changed = [key for key, value in options.items() if _changes(key, value)]
    if fits:
        for patterns, why in _unread_by_a_fit(config):
            unread |= {key: why for key in changed if any(fnmatch(key, pattern) for pattern in patterns)}
    else:
        untrained = [key for key in changed if key in TRAINING or key.startswith("stages.")]
        unread |= {key: f"lightning {command} trains nothing" for key in untrained if given.typed(key)}
    kept = _kept_by_a_run(config)
    unread |= {
        key: f"the run's {kept[key]!r} is used"
        for key in kept
        if (given.typed(key) or key == VARIABLE) and _misses(config, key, kept)
    }
    if unread and is_first_process():
        names = "; ".join(f"{_name(key)} ({why})" for key, why in sorted(unread.items()))
        print(f"options that have no effect here: {names}", file=sys.stderr)


def _kept_by_a_run(config: Namespace) -> dict[str, str | None]:
    """Returns the options that a resumed run takes from its folder and not from the user."""
    folder = find_run(config.ckpt_path) if config.get("ckpt_path") else None
    if folder is None:
        return {}
    about = read_run_file(folder)
    kept = {f"run.{name}": about.get(name) for name in ("experiment", "name")} | {"run.root": str(folder.parent.parent)}
    # An embedded store that was left behind is replaced by what is given now
    if (uri := about.get("tracking_uri")) and keeps_run(uri):
        kept |= {"run.tracking_uri": uri, VARIABLE: uri}
    return kept


def _misses(config: Namespace, key: str, kept: dict[str, str | None]) -> bool:
    if key == VARIABLE:
        value = None if _at(config, "run.tracking_uri") else os.environ.get(VARIABLE)
    else:
        value = _at(config, key)
    if not value:
        return False
    if key in ("run.tracking_uri", VARIABLE):
        return shown(mlflow_store(value)) != kept[key]
    return (str(Path(value).absolute()) if key == "run.root" else value) != kept[key]


def _unread_by_a_fit(config: Namespace) -> Iterator[tuple[list[str], str]]:
    """Yields patterns of options that a fit does not read, and why. Options of skipped stages are not among them."""
    selector = _at(config, f"{LTE}selector") or "router"
    skipped = {
        stage for stage in STAGES if 0 in (_at(config, f"stages.{stage}.{unit}") for unit in ("epochs", "steps"))
    }
    learns = {"router"} if _at(config, f"{MODEL}freeze_routers") is not False else {"router", "expert"}
    kind = selector_class(selector)
    equation_6 = [f"{MODEL}efficiency_weight", f"{MODEL}separability_*"]
    if kind.learns != "efficiency":
        yield equation_6, f"selector {selector} is not trained with the efficiency and separability losses"
    elif not learns - skipped:
        yield equation_6, "no stage of this fit trains the routers"
    if kind.learns != "balance":
        yield [f"{MODEL}balance_weight"], f"selector {selector} has no balance loss"
    if kind.no_target:
        yield [f"{LTE}target_*"], f"selector {selector}: {kind.no_target}"
    if kind.scales or not kind.graded:
        yield [f"{LTE}threshold"], f"selector {selector} chooses without a threshold"
    if selector != "router" and kind.__module__.startswith("lte_lightning."):
        yield [f"{LTE}router_*"], f"selector {selector} is not LTE's router"
    if selector == "router" and _at(config, f"{LTE}router_bias") is False:
        yield [f"{LTE}router_margin"], "the routers have no bias"
    for stage in STAGES:
        if stage in skipped:
            continue
        if stage not in learns:
            yield [f"stages.{stage}.router_*"], "the routers are not trained in that stage"
        if _at(config, f"stages.{stage}.steps") is not None:
            yield [f"stages.{stage}.epochs"], "steps are given"
        if _at(config, f"stages.{stage}.schedule") == "constant":
            yield [f"stages.{stage}.final"], "the schedule is constant"
    if _at(config, "run.latency_rows") is None:
        yield [f"{MODEL}backend"], "training computes every expert"


def _refuse(key: str, value: Any, config: Namespace) -> None:
    name, used = _name(key), _used(config, key)
    if key in LINKED:
        raise UserError(f"{name} is {value!r}, but {used!r} would be used; leave it out ({LINKED[key]})")
    raise UserError(
        f"{name} is {value!r}, but {config.get('ckpt_path')} was written with {used!r}, which would be used; leave "
        f"{name} out, or begin from the weights alone, with --model.init_from RUN/model instead of --ckpt_path"
    )


def _leaves(part: Namespace, config: Namespace, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(part).items():
        if isinstance(value, Namespace):
            # A class that has no subclasses is given by its path, and used by its arguments alone
            plain = "class_path" in value and _at(config, f"{prefix}{name}.class_path") is None
            yield from _leaves(value.get("init_args", Namespace()) if plain else value, config, f"{prefix}{name}.")
        elif name not in ("config", "dict_kwargs", "__path__"):
            yield f"{prefix}{name}", value


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = (config.as_dict() if isinstance(config, Namespace) else config or {}).get(name)
    return config


def _used(config: Namespace, key: str) -> Any:
    return _at(config, "data.init_args.task" if key == f"{MODEL}task" else key)


def _differs(typed: Any, used: Any) -> bool:
    # What an interpolation refers to is what is used; a path or an enumeration is written as a text
    used = used.as_dict() if isinstance(used, Namespace) else used
    return not (isinstance(typed, str) and "${" in typed) and typed != used and str(typed) != str(used)


def _changes(key: str, value: Any) -> bool:
    return _differs(value, DEFAULTS.get(key.rpartition(".")[2]))


def _name(key: str) -> str:
    return key.replace("init_args.", "")

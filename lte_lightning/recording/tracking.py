"""The facts of a run for MLflow beside its values: name, description, tags, every option, and the data."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lte_lightning.choices import options_by_name
from lte_lightning.core.model.card import public_name
from lte_lightning.core.model.head import classifies
from lte_lightning.recording.loggers import RunLogger, mlflow_of
from lte_lightning.recording.machine import code
from lte_lightning.results import Results
from lte_lightning.store import shown
from lte_lightning.trainer import declared


class Rates(Callback):
    """Logs the learning rate of each group of weights, ``lr/model`` and ``lr/routers``, to every logger.

    An epoch shorter than Lightning's interval of logging is logged once: a small file has a curve, too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs at least once an epoch."""
        batches = trainer.num_training_batches  # inf for a stream
        if 1 <= batches < declared(trainer).log_every_n_steps:
            declared(trainer).log_every_n_steps = int(batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Logs the rates of the step that begins, as often as losses are logged."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step under which Lightning logs its own values
        if not trainer.loggers or step % declared(trainer).log_every_n_steps:
            return
        rates = {
            f"lr/{group.get('name', f'group_{number}')}": group["lr"]
            for optimizer in trainer.optimizers
            for number, group in enumerate(optimizer.param_groups)
        }
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=step)


def method(module: Any) -> str:
    """Returns how a module's experts are selected: ``lte``, or a baseline's name."""
    selector = module.lte.selector if module.lte else "router"
    return "lte" if selector == "router" else selector


def run_name(module: Any, data: Any) -> str:
    """Returns a name that distinguishes a run from others: task, method, target, seed."""
    target = lte.target_sparsity if (lte := module.lte) else None
    budget = lte.budget if lte else None
    weight = module.hparams.get("efficiency_weight")
    dial = f"{100 * target:g} %" if target is not None else f"eta {weight:g}" if weight is not None else None
    dial = f"{100 * budget[1]:g} % of {budget[0]}" if budget else dial
    parts = [getattr(data, "task", None), method(module), dial, f"seed {module.hparams['seed']}"]
    return ", ".join(part for part in parts if part)


def tags(module: Any, data: Any) -> dict[str, str]:
    """Returns a run's tags at its start: task, method, model, commit, and a description."""
    model = public_name(module.hparams["init_from"] or module.hparams["pretrained"])
    commit = code()
    values = {
        "lte.task": getattr(data, "task", None),
        "lte.method": method(module),
        "lte.model": model,
        "lte.commit": commit["commit"] or commit["code"],
        "mlflow.note.content": f"{method(module)} on {getattr(data, 'task', 'data')}, from {model}.",
    }
    return {key: value for key, value in values.items() if value}


def end_tags(results: Results, stage: str) -> dict[str, str]:
    """Returns a run's tags at its end: the stage reached, and a description with the results."""
    view = next((name for name in ("hard", "hard_before", "soft", "dense") if getattr(results, name) is not None), None)
    measured = f"{results.metric} {getattr(results, view):.4f} ({view})" if view else "nothing measured"
    sparse = f" at {100 * results.sparsity:.1f} % FFN sparsity" if results.sparsity is not None else ""
    dense = f"; dense {results.dense:.4f}" if results.dense is not None and view != "dense" else ""
    note = f"{results.task}: {measured}{sparse}{dense}."
    return {"lte.stage": stage, "mlflow.note.content": note}


def data_input(data: Any) -> dict[str, Any] | None:
    """Returns the data set of a run in the form of MLflow's inputs: its source, its rows and its fingerprint."""
    source, ready = getattr(data, "source", None), getattr(data, "_ready", None)
    if not source or not isinstance(data, LightningDataModule):
        return None
    rows = {role: [each for each in sets if hasattr(each, "_fingerprint")] for role, sets in (ready or {}).items()}
    marks = [each._fingerprint for sets in rows.values() for each in sets]
    profile = {f"{role}_rows": sum(map(len, sets)) for role, sets in rows.items() if sets}
    local = Path(source).exists()
    return {
        "name": str(getattr(data, "task", None) or public_name(source)),
        "digest": hashlib.sha256(repr(marks or source).encode()).hexdigest()[:16],
        "source_type": "local" if local else "hugging_face",
        "source": str(Path(source).resolve()) if local else shown(source),
        "profile": profile,
    }


@rank_zero_only
def announce(trainer: Trainer, module: Any, config: Mapping[str, Any]) -> None:
    """Sends MLflow all facts that are known at the start of a run.

    Args:
        trainer: A trainer whose data module is set up.
        module: The task.
        config: The resolved configuration, as plain types.
    """
    logger = mlflow_of(trainer)
    if not isinstance(logger, RunLogger) or trainer.state.fn != "fit":
        return
    data: Any = getattr(trainer, "datamodule", None)
    sections = ("data", "model", "stages", "trainer", "run", "seed_everything")
    options = {key: value for key, value in config.items() if key in sections}
    logger.tell(tags=tags(module, data))
    logger.options = options_by_name(options)
    if (dataset := data_input(data)) is not None:
        logger.tell(data=dataset)


@rank_zero_only
def conclude(trainer: Trainer, module: Any, results: Results, log_model: bool, register_as: str | None) -> None:
    """Sends a fit's results to every logger, and its model to MLflow.

    Args:
        trainer: The fit's trainer.
        module: The task; its model is saved in the run's folder.
        results: The fit's results.
        log_model: Whether MLflow gets the model.
        register_as: The registered model that gets this model as a new version.
    """
    for logger in trainer.loggers:
        logger.log_metrics(results.metrics(), step=trainer.global_step)
    mlflow = mlflow_of(trainer)
    if not isinstance(mlflow, RunLogger):
        return
    mlflow.tell(tags=end_tags(results, module.stage))
    if not log_model:
        return
    if (kind := served(trainer, module)) is None:
        rank_zero_info(f"MLflow gets no model: a {type(module.net).__name__} neither classifies nor writes")
        return
    mlflow.tell(model={"folder": "model", "columns": kind[0], "kind": kind[1], "register_as": register_as})


def served(trainer: Trainer, module: Any) -> tuple[list[str], str] | None:
    """Returns a task's text columns and the kind of its answers, or None for a task that MLflow cannot serve."""
    columns = list(getattr(getattr(trainer, "datamodule", None), "text_columns", None) or ["text"])
    if classifies(type(module.net).__name__):
        return columns, "regression" if module.net.config.num_labels == 1 else "classification"
    return (["text"], "text") if module.net.can_generate() else None

"""A run's folder: its own file, its model, and the command that resumes it."""

import shlex
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lte_lightning.core.model.saving import save_pretrained
from lte_lightning.files import write_json
from lte_lightning.results import FILE, read_results
from lte_lightning.store import RUN_LAYOUT

RUN_FILE = "run.json"
LAST = "checkpoints/last.ckpt"


def write_run_file(folder: Path, experiment: str, name: str | None, run_id: str | None, uri: str | None) -> None:
    """Notes the run's store and its id there.

    Args:
        folder: The run's folder.
        experiment: Name of the MLflow experiment.
        name: Name of the run.
        run_id: Id in MLflow; None without MLflow.
        uri: MLflow's store, without a password.
    """
    about = {"run_id": run_id, "tracking_uri": uri, "experiment": experiment}
    write_json(folder / RUN_FILE, {"layout": RUN_LAYOUT, "name": name, **about})


def how_to_resume(folder: Path) -> str:
    """Returns the command that resumes from the last checkpoint."""
    config, last = (shlex.quote(str(folder / name)) for name in ("config.yaml", LAST))
    return f"The last finished epoch is kept; resume with\n  lightning fit --config {config} --ckpt_path {last}"


def task_suffix(folder: Path, task: str | None) -> str:
    """Returns the suffix of the files of a test or prediction on another task than the fit's, "" on the same task."""
    fitted = read_results(folder).task if (folder / FILE).exists() else task
    return "" if task == fitted else f"-{task}"


def save_model(
    model: PreTrainedModel, folder: Path, about: dict[str, Any], tokenizer: Any, state: dict[str, Any] | None
) -> None:
    """Saves a run's model, and its tokenizer if the data have one that can be saved.

    Args:
        model: The model.
        folder: Target folder.
        about: Further facts for its description.
        tokenizer: The data's tokenizer, or None.
        state: The model's state dict if its weights are sharded over devices; else None.
    """
    save_pretrained(model, folder, about, **({} if state is None else {"state_dict": state}))
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)

"""A saved model with the rows that it was trained on, for ``lte calibrate`` and ``lte curve``."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lte_lightning.cli.training import LteCLI, make_cli, user_error
from lte_lightning.core.model.folder import find_saved, read_description
from lte_lightning.core.routing.prune import Batch
from lte_lightning.errors import UserError, meant_path
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.classification import Classification
from lte_lightning.tasks.selector_training import sampled


@dataclass(frozen=True)
class Rows:
    """A saved model in hard mode, with the data that it was trained on, or with others.

    Args:
        folder: The model's folder.
        module: The task's module; its ``net`` is on the device.
        data: Set up for training and validation rows.
        source: The origin of the rows, for messages.
        precision: The trainer's precision.
    """

    folder: Path
    module: LteModule
    data: LightningDataModule
    source: str
    precision: str

    def computing(self) -> AbstractContextManager[Any]:
        """Returns the context that a forward pass runs in: autocast where the precision is mixed."""
        if "mixed" not in self.precision:
            return nullcontext()
        kind = torch.bfloat16 if "bf16" in self.precision else torch.float16
        return torch.autocast(self.module.net.device.type, dtype=kind)

    def calibration(self) -> Iterator[Batch]:
        """Returns, for a part of each training batch, a call that runs the model on it, and the token masks."""
        return sampled(self.module, self.data.train_dataloader(), self.moved)

    def validation(self) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Yields the validation batches, each with the number of its loader."""
        loaders: Any = self.data.val_dataloader()
        for number, loader in enumerate([loaders] if isinstance(loaders, DataLoader) else loaders):
            for batch in loader:
                yield self.moved(batch), number

    def moved(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a batch on the model's device."""
        return {key: value.to(self.module.net.device) for key, value in batch.items()}


class _Parts(LteCLI):
    """Makes the module and its data, and no trainer."""

    def before_instantiate_classes(self) -> None:
        """Does not name options that only a fit reads."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Returns None."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def load_rows(folder: str, data: str | None, device: torch.device) -> Rows:
    """Loads a saved model with rows.

    Args:
        folder: A saved LTE model, or a run.
        data: A configuration with ``data`` and ``model``, or a text for a language model, a file or a folder; None for
            the configuration of the run that saved the model.
        device: Device of the model.

    Raises:
        UserError: If there is no such model, no rows are known, or they do not fit.
    """
    path = find_saved(folder)
    if (mode := read_description(path)["mode"]) != "hard":
        raise UserError(
            f"{folder} was saved in mode {mode!r}, in which every expert runs; train its expert stage first, where "
            "thresholds take effect"
        )
    words, source = _words(path, data)
    words += ["--model.init_from", str(path), "--trainer.logger", "false"]
    try:
        with patch("sys.argv", ["lte"]):  # Lightning warns if both sys.argv and its argument hold a command line
            cli = make_cli(["fit", *words], cli_class=_Parts)
    except Exception as error:
        if (cause := user_error(error)) is None:
            raise
        raise UserError(f"{source}: {cause}") from error
    module, precision = cli.model, str(cli.config.fit.trainer.precision or "32-true")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    if isinstance(module, Classification):
        module.rows = cli.datamodule
    module.configure_model()
    if precision.endswith("-true"):
        module.net.to({"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32))
    module.to(device).eval()
    module.before_export()
    return Rows(path, module, cli.datamodule, source, precision)


def _words(folder: Path, data: str | None) -> tuple[list[str], str]:
    """Returns the command line that describes the module and its data, and their origin for messages."""
    if data is None:
        config = next((path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.exists()), None)
        if config is None:
            raise UserError(
                f"{folder} has no config.yaml in it or beside it, so its data are unknown; name them with --data: a "
                "configuration (.yaml) with model and data, or a text file"
            )
        return ["--config", str(config)], str(config)
    if data.endswith((".yaml", ".yml")):
        if not Path(data).is_file():
            raise UserError(f"no file {data}{meant_path(data)}")
        return ["--config", data], data
    return [
        *("--model", "lte_lightning.tasks.LanguageModel", "--model.pretrained", str(folder)),
        *("--data", "lte_lightning.data.LanguageModelData", "--data.source", data),
    ], data

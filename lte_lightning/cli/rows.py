"""A saved model with rows to run it on, for commands that look at what it does: ``lte calibrate``, ``lte curve``."""

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
from lte_lightning.core.model.folder import is_lte, read_description
from lte_lightning.core.routing.prune import Batch
from lte_lightning.errors import UserError
from lte_lightning.tasks.base import LteModule
from lte_lightning.tasks.baselines import sampled


@dataclass(frozen=True)
class Rows:
    """A saved model, in hard mode, and the data that it was trained on or others.

    Args:
        folder: The model's.
        module: The task's module; its ``net`` is on the device.
        data: Set up for training and validation rows.
        source: Where the rows are from, for people.
        precision: As of the trainer.
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
        """Returns a part of each training batch: what runs the model on it, and its token masks."""
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
        """Leaves options that only a fit reads unnamed."""

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
            the configuration of the run that the model is of.
        device: Where to.

    Raises:
        UserError: If there is no such model, no rows are known, or they do not fit.
    """
    path = next((path for path in (Path(folder), Path(folder, "model")) if path.is_dir() and is_lte(path)), None)
    if path is None:
        raise UserError(f"{folder} is no folder of a saved LTE model, nor of a run that has one (RUN/model)")
    if (mode := read_description(path)["mode"]) != "hard":
        raise UserError(
            f"{folder} was saved in mode {mode!r}, where every expert runs: its expert stage is missing, and "
            "no threshold decides until then"
        )
    words, source = _words(path, data)
    words += ["--model.init_from", str(path), "--trainer.logger", "false"]
    try:
        with patch("sys.argv", ["lte"]):  # or Lightning warns that both it and its argument hold a command line
            cli = make_cli(["fit", *words], cli_class=_Parts)
    except Exception as error:
        if (cause := user_error(error)) is None:
            raise
        raise UserError(f"{source}: {cause}") from error
    module, precision = cli.model, str(cli.config.fit.trainer.precision or "32-true")
    module.configure_model()
    if precision.endswith("-true"):
        module.net.to({"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32))
    module.to(device).eval()
    module.before_export()
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    return Rows(path, module, cli.datamodule, source, precision)


def _words(folder: Path, data: str | None) -> tuple[list[str], str]:
    """The command line that describes the module and its data, and what they are, for people."""
    if data is None:
        config = next((path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.exists()), None)
        if config is None:
            raise UserError(
                f"{folder} is in no run's folder, whose config.yaml would name rows; name them by --data: a "
                "configuration (.yaml) with model and data, or a text file"
            )
        return ["--config", str(config)], str(config)
    if data.endswith((".yaml", ".yml")):
        if not Path(data).is_file():
            raise UserError(f"no file {data}")
        return ["--config", data], data
    return [
        *("--model", "lte_lightning.tasks.LanguageModel", "--model.pretrained", str(folder)),
        *("--data", "lte_lightning.data.LanguageModelData", "--data.source", data),
    ], data

"""Checkpoints: the last one to resume from, and the best in hard mode."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lte_lightning.callbacks.module import lte_module
from lte_lightning.files import exchange, whole_file
from lte_lightning.results import better


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their target, flushed and renamed: the one before survives a kill and a full disk.

    Lightning's own are written in the system's temporary folder and copied from there. Addresses of object stores
    (``s3://...``), which have no rename, are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: If it cannot be written; the file of that name is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = target = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():  # a fit on several devices began, and one device goes on
            path = path.with_name(f"{path.name}.new")
        with whole_file(path, "wb") as file:
            torch.save(checkpoint, file)
        if path != target:
            exchange(path, target)
            shutil.rmtree(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, a file or the folder of a fit on several devices (``trainer.strategy fsdp2``)."""
        if Path(path).is_dir():
            from lte_lightning.callbacks.sharded_checkpoint import read_folder  # slow, and for few

            return read_folder(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=weights_only)


def keep_checkpoints_in(trainer: Trainer, folder: Path) -> None:
    """Sends a trainer's checkpoints into a folder, but for those that its user has sent elsewhere."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder)


def write_checkpoints_whole(trainer: Trainer) -> None:
    """Lets a trainer write all checkpoints so, unless its user or strategy has another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


class _Movable(ModelCheckpoint):
    """Rewrites checkpoint paths after the run folder was moved or copied."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sees to it that its files are written whole."""
        write_checkpoints_whole(trainer)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the paths of the folder that is resumed for those that the checkpoint was written with."""
        old, new = state_dict.get("dirpath"), self.dirpath
        if old and new and old != new:

            def moved(path: str) -> str:
                return str(Path(new, Path(path).name)) if path else ""

            state_dict = state_dict | {"dirpath": new}
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state_dict[name] = moved(state_dict[name])
            state_dict["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict)


class LastCheckpoint(_Movable):
    """Keeps the state after every epoch in ``last.ckpt``, to resume from."""

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a whole epoch. Nothing could resume one that trainer.max_steps has cut short."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            super().on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(_Movable):
    """Keeps the weights of the best epoch of the expert stage in ``best.ckpt``.

    Epochs of other stages do not compete. Their figures are better, but such models do not skip experts.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            mode="max",
            save_weights_only=True,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watches the module's own metric, in the direction that is better."""
        metric = lte_module(pl_module).metric_name
        self.monitor = f"val/hard/{metric}"
        if better(metric, 0, 1):
            self.mode, self.kth_value = "min", torch.tensor(torch.inf)
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, in the expert stage only."""
        if lte_module(pl_module).stage == "expert":
            super().on_validation_end(trainer, pl_module)


def back_to_best(trainer: Trainer, pl_module: LightningModule) -> None:
    """Goes back to the weights of the best checkpoint, if the expert stage was reached and one was kept."""
    module = lte_module(pl_module)
    best = next((c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), "")
    if best and module.stage == "expert":
        checkpoint = trainer.strategy.load_checkpoint(best, weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
        module.measured |= {"hard": checkpoint["lte"]["measured"]["hard"]}

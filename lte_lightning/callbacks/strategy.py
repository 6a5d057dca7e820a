"""FSDP2 for fits in stages: weights, gradients and what optimizers know are shared out over the devices."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from lte_lightning.callbacks.module import lte_module
from lte_lightning.callbacks.sharded_checkpoint import read_folder, write_folder
from lte_lightning.core.model.exact import is_part, is_sharded
from lte_lightning.core.model.sharding import part_like, reshard, shard
from lte_lightning.errors import UserError
from lte_lightning.tasks.equal_batches import KeepPace
from lte_lightning.trainer import declared

NAME = "fsdp2"


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over one dimension, the data's: ``trainer.strategy fsdp2``.

    Every process loads the model whole, in the host's memory, and keeps its part. As with one device, a checkpoint is
    read before optimizers are made, so that these are of the stage that it was written in.
    """

    strategy_name = NAME

    def __init__(self, **how: Any) -> None:
        super().__init__(tensor_parallel_size=1, **how)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Says that a checkpoint is read first."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Says that Lightning hands over the optimizers' states."""
        return True

    def setup_environment(self) -> None:
        """Makes the mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shares out the weights, unless a checkpoint has been read already, and sees to it that all keep pace."""
        self._shard()
        callbacks = declared(trainer).callbacks
        if not any(isinstance(callback, KeepPace) for callback in callbacks):
            callbacks.append(KeepPace())
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes the stage's optimizers, of the parts: what a forward pass has gathered is given back first."""
        assert self.lightning_module is not None
        reshard(lte_module(self.lightning_module).net)
        super().setup_optimizers(trainer)

    def _shard(self) -> None:
        assert self.lightning_module is not None
        module = lte_module(self.lightning_module)
        if module.quantize:
            raise UserError(
                f"model.quantize rounds whole weights: leave trainer.strategy {NAME} out, test on one device"
            )
        if not is_sharded(module.net):
            shard(module.net, self._mesh)

    @property
    def _mesh(self) -> Any:
        return self.device_mesh["data_parallel"]

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns this process's parts of the weights."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns this process's parts of what an optimizer knows."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint's folder whole, or leaves the one before."""
        if storage_options is not None:
            raise UserError(f"storage_options cannot be used with trainer.strategy {NAME}")
        write_folder(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, a folder of any number of processes or a file."""
        self._shard()
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return read_folder(path, self._mesh)
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: _part(value, own.get(name)) for name, value in state.items()}
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Hands the module its parts of the weights."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Hands optimizers their parts of what they knew."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for place, known in state["state"].items():
                state["state"][place] = {key: _part(value, parameters[place]) for key, value in known.items()}
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)


def _part(value: Any, like: Any) -> Any:
    """Returns the part of a whole tensor that is shared out as another one of its shape; anything else as it is."""
    alike = isinstance(value, torch.Tensor) and is_part(like) and not is_part(value) and value.shape == like.shape
    return part_like(value, like) if alike else value


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP2, by stages")

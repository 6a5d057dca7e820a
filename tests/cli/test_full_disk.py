"""A fit whose disk is full stops in one line, and goes on from its last whole checkpoint."""

import resource

import pytest
import torch

from lte_lightning.callbacks import StageSchedule
from lte_lightning.callbacks.checkpoints import WholeCheckpointIO


@pytest.fixture
def full_after(monkeypatch):
    """`full_after(epoch)`: from the end of that epoch on no file can be larger than a few kilobytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = StageSchedule.on_train_epoch_end

    def arrange(epoch):
        def hook(self, trainer, module):
            if trainer.current_epoch == epoch:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            whole(self, trainer, module)

        monkeypatch.setattr(StageSchedule, "on_train_epoch_end", hook)

    yield arrange
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("epoch", [1, 3])
def test_stopped_by_a_full_disk_and_resumed(epoch, tiny, lightning, tmp_path, full_after):
    config = tiny.config(epochs=(1, 1, 2))
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    whole = lightning(tmp_path / "whole", config, "fit")
    assert whole.code == 0, whole.err

    full_after(epoch)
    stopped = lightning(tmp_path / "full", config, "fit")
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    full_after(-1)
    assert stopped.code == 1
    checkpoints = stopped.run / "checkpoints"
    assert "ckpt: File too large" in stopped.err
    assert f"--ckpt_path {checkpoints / 'last.ckpt'}" in stopped.err
    assert "Traceback" not in stopped.err
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["epoch"] == epoch - 1
    assert not list(checkpoints.glob("*.tmp"))

    resumed = lightning(tmp_path / "full", config, "fit", "--ckpt_path", checkpoints / "last.ckpt")
    assert resumed.code == 0, resumed.err
    mine, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (resumed.run, whole.run)
    )
    assert [key for key, value in mine["state_dict"].items() if not torch.equal(value, theirs["state_dict"][key])] == []
    assert mine["lte"]["measured"] == theirs["lte"]["measured"]


def test_every_checkpoint_goes_this_way(tiny, lightning, tmp_path, monkeypatch):
    written, save = [], WholeCheckpointIO.save_checkpoint

    def watch(self, checkpoint, path, storage_options=None):
        written.append(str(path))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", watch)
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "own"}}
    fit = lightning(tmp_path, tiny.config(**{"trainer.callbacks": [own]}), "fit")
    assert fit.code == 0, fit.err
    there = {str(path) for path in (fit.run / "checkpoints").iterdir()}
    assert there == set(written)
    assert len(there) == 3

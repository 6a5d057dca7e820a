"""A checkpoint is there whole, or the one before it is, whatever happens while it is written."""

import multiprocessing
import time

import pytest
import torch

from lte_lightning.callbacks.checkpoints import WholeCheckpointIO
from lte_lightning.errors import UserError


def content(number):
    return {"number": number, "weight": torch.full((500_000,), float(number))}


def read(path):
    found = torch.load(path, weights_only=True)
    assert (found["weight"] == found["number"]).all()
    return found["number"]


@pytest.mark.parametrize("size", [0, 10, 100_000, 1_999_000, 2_000_600])
def test_a_full_disk_leaves_the_one_before(size, no_file_larger_than, tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(content(1), last)
    with pytest.raises(UserError) as refused, no_file_larger_than(size):
        WholeCheckpointIO().save_checkpoint(content(2), last)
    assert str(refused.value) == f"cannot write {last}: File too large; the file before it is kept"
    assert read(last) == 1
    assert list(last.parent.iterdir()) == [last]
    WholeCheckpointIO().save_checkpoint(content(3), last)
    assert read(last) == 3


def test_a_full_disk_from_the_start_leaves_nothing(no_file_larger_than, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: File too large$"), no_file_larger_than(1000):
        WholeCheckpointIO().save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def write_on_and_on(path):
    for number in range(1, 10_000):
        WholeCheckpointIO().save_checkpoint(content(number), path)


# the child only writes files
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_a_kill_in_the_middle_leaves_a_whole_one(delay, tmp_path):
    last, staging = tmp_path / "last.ckpt", tmp_path / "last.ckpt.tmp"
    process = multiprocessing.get_context("fork").Process(target=write_on_and_on, args=(last,))
    process.start()
    while not (last.exists() and staging.exists()):
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    number = read(last)
    assert number >= 1
    WholeCheckpointIO().save_checkpoint(content(number + 1), last)  # over what the killed one has left
    assert read(last) == number + 1
    assert list(tmp_path.iterdir()) == [last]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "elsewhere" / "last.ckpt")
    WholeCheckpointIO().save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_symlink()
    assert read(tmp_path / "elsewhere" / "last.ckpt") == 1

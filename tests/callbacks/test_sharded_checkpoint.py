"""Checkpoint folders from anybody: nothing in them is run, and what is damaged is said in one line."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from lte_lightning.callbacks.sharded_checkpoint import INDEX, META, read_folder, write_folder
from lte_lightning.errors import UserError
from lte_lightning.files import exchange, is_checkpoint


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def checkpoint(value=1.0):
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "flag": True}}, "param_groups": []}
    state = {"net.weight": torch.full((4, 3), value), "net.bias": torch.zeros(4, dtype=torch.bfloat16)}
    return {"epoch": 2, "state_dict": state, "optimizer_states": [optimizer], "lte": {"stage": "router"}}


@pytest.fixture
def folder(alone, tmp_path):
    write_folder(checkpoint(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_what_is_written_is_read(folder):
    found, expected = read_folder(folder), checkpoint()
    assert is_checkpoint(folder)
    assert found["epoch"] == 2
    assert found["lte"] == {"stage": "router"}
    for name, value in expected["state_dict"].items():
        assert found["state_dict"][name].equal(value)
        assert found["state_dict"][name].dtype == value.dtype
    known = found["optimizer_states"][0]["state"][0]
    assert known["flag"] is True
    assert known["step"] == 3
    assert known["exp_avg"].equal(torch.ones(4))


def test_the_one_before_stays_until_the_next_is_whole(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*the one before it is kept"):
            write_folder(checkpoint(2.0), folder)
    assert read_folder(folder)["state_dict"]["net.weight"].equal(torch.ones(4, 3))
    folder.with_name("last.ckpt.tmp").mkdir()  # as a kill leaves it
    write_folder(checkpoint(2.0), folder)
    assert read_folder(folder)["state_dict"]["net.weight"].equal(torch.full((4, 3), 2.0))
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


class Opens:
    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize("file", [META, INDEX])
def test_nothing_of_a_stranger_s_is_run(file, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / file).write_bytes(pickle.dumps(Opens()))
    with pytest.raises(UserError, match="is damaged"):
        read_folder(folder)
    assert not (folder.parent / "opened").exists()


def test_paths_outside_of_the_folder_are_refused(folder):
    index = pickle.loads((folder / INDEX).read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="names files outside of its folder"):
        read_folder(folder)


@pytest.mark.parametrize("how", ["cut", "gone", "garbage"])
@pytest.mark.parametrize("which", [META, INDEX, "__0_0.distcp"])
def test_damage_is_one_line(which, how, folder):
    path = folder / which
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50] if how == "cut" else b"garbage " * 20)
    with pytest.raises(UserError, match=r"the checkpoint .*last\.ckpt (is damaged|lacks files)") as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("late", "written\nread 0\n"),
        ("prepare", "cannot write the checkpoint /last.ckpt: No space left on device\n"),
        ("read", "written\nthe checkpoint /last.ckpt is damaged (No space left on device); resume from another one"),
    ],
)
def test_no_process_waits_for_one_that_failed_or_runs_ahead_of_one_that_is_late(fault, said, tmp_path):
    words = [sys.executable, Path(__file__).with_name("one_of_two.py")]
    both = [
        subprocess.Popen(
            [*words, str(rank), tmp_path, fault], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    for out, err in ends:
        assert out.replace("[Errno 28] ", "").startswith(said), err


@pytest.mark.parametrize("swaps", [True, False])
def test_folders_take_each_other_s_names(swaps, tmp_path, monkeypatch):
    if not swaps:
        monkeypatch.setattr("lte_lightning.files._swap", lambda *_: False)
    new, old = tmp_path / "new", tmp_path / "old"
    for path in (new, old):
        path.mkdir()
        (path / "name").write_text(path.name)
    exchange(new, old)
    assert (old / "name").read_text() == "new"
    assert (new / "name").read_text() == "old"
    shutil.rmtree(old)
    exchange(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]

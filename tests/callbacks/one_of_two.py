"""One of two processes that write and read a checkpoint folder; `test_sharded_checkpoint.py` starts both.

Prints what it met: `written` and `read`, or the error.
"""

import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from lte_lightning.callbacks import sharded_checkpoint
from lte_lightning.errors import UserError

rank, folder, fault = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


def late(remove):
    def run(path):
        time.sleep(0.7)  # the other process is ready before this one
        remove(path)

    return run


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
checkpoint = {"epoch": rank, "state_dict": {"net.weight": torch.ones(4, 3)}}
try:
    if fault == "late":
        sharded_checkpoint._remove = late(sharded_checkpoint._remove)
    if (fault, rank) == ("prepare", 0):
        sharded_checkpoint._remove = fail
    sharded_checkpoint.write_folder(checkpoint, folder / "last.ckpt")
    print("written")
    if (fault, rank) == ("read", 1):
        sharded_checkpoint._Reader.read_metadata = fail
    mesh = init_device_mesh("cpu", (2,))
    found = sharded_checkpoint.read_folder(folder / "last.ckpt", mesh)
    assert found["state_dict"]["net.weight"].equal(torch.ones(4, 3))
    print("read", found["epoch"])
except UserError as error:
    print(str(error).replace(str(folder), ""))

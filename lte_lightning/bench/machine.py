"""The machine that is measured: its device, its clock, its cores and its cache."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lte_lightning.errors import UserError
from lte_lightning.kernels.dispatch import BACKENDS, Backend

Clock = Callable[[], float]
Model = TypeVar("Model", bound=nn.Module)
# "cpu" is the time of the calling thread alone: what other processes took from it is left out.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}


def find_device(name: str) -> torch.device:
    """Returns a device by name; ``auto`` is CUDA where torch sees such a device, and else the CPU.

    Raises:
        UserError: If there is none of this name here.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if seen else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; there are auto, cpu, cuda, and cuda:1 and so on")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise UserError(f"--device is {name}, and torch sees {seen} CUDA devices here; leave it out, or take cpu")
    return device


def find_backend(name: str) -> Backend:
    """Returns a backend by name.

    Raises:
        UserError: If there is none of this name.
    """
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise UserError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")


def moved(model: Model, device: torch.device) -> Model:
    """Moves a model to a device, and returns it with the type that it has."""
    nn.Module.to(model, device)
    return model


def clock_on(device: torch.device, clock: Clock = time.perf_counter) -> Clock:
    """Returns a clock, in seconds, that first waits until the device has done all that it was given."""
    if device.type == "cpu":
        return clock

    def after_the_device() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return after_the_device


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last cache: a GPU's, or that which Linux knows, or 64 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"\d+K", size)]
    return max(found, default=64 << 20)


@contextmanager
def pinned(threads: int | None = None) -> Iterator[list[int]]:
    """Sets torch's number of threads, and binds this process to as many cores, until the block ends.

    A thread may move between these cores and to no other. The first that the process is allowed are taken (``taskset``
    allows it others), one logical CPU of each core before the second of any.

    Args:
        threads: torch's threads; as they are if not given.

    Yields:
        The logical CPUs; none where the system binds nothing.
    """
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    allowed: dict[int, set[int]] = {}  # by thread: those of torch's that are there already do not follow the first
    cores: list[int] = []
    try:
        if hasattr(os, "sched_setaffinity"):
            whole = os.sched_getaffinity(0)
            wanted = _spread(whole)[: torch.get_num_threads()]
            with suppress(OSError):  # a container may forbid it
                for thread in _threads():
                    with suppress(ProcessLookupError):
                        allowed[thread] = os.sched_getaffinity(thread)
                        os.sched_setaffinity(thread, wanted)
                cores = sorted(wanted)
        yield cores
    finally:
        for thread in _threads() if allowed else []:
            with suppress(OSError):
                os.sched_setaffinity(thread, allowed.get(thread, whole))
        torch.set_num_threads(before)


def _threads() -> list[int]:
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _spread(cpus: set[int]) -> list[int]:
    """Orders logical CPUs: one of each core, then the others."""
    seen: dict[str, int] = {}

    def place(cpu: int) -> tuple[int, int]:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        seen[core] = seen.get(core, 0) + 1
        return seen[core], cpu

    return sorted(sorted(cpus), key=place)

"""The measured machine: its device, clock, cores and cache."""

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
# "cpu" counts the processor time of the calling thread alone, so other processes do not disturb it.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}


def find_device(name: str) -> torch.device:
    """Returns a device by name; ``auto`` is CUDA if torch sees a CUDA device, else the CPU.

    Raises:
        UserError: If this machine has no such device.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if seen else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; there are auto, cpu, cuda, and cuda:1 and so on")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise UserError(f"--device is {name}, and torch sees {seen} CUDA devices here; leave it out, or use cpu")
    return device


def find_backend(name: str) -> Backend:
    """Returns a backend by name.

    Raises:
        UserError: If the name is unknown.
    """
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise UserError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")


def moved(model: Model, device: torch.device) -> Model:
    """Moves a model to a device and returns it, with its own Python type."""
    nn.Module.to(model, device)
    return model


def clock_on(device: torch.device, clock: Clock = time.perf_counter) -> Clock:
    """Returns a clock, in seconds, that first waits for all work of the device."""
    if device.type == "cpu":
        return clock

    def after_the_device() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return after_the_device


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last-level cache in bytes: the GPU's, or the CPU's as Linux reports it, or 64 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"\d+K", size)), default=64 << 20)


@contextmanager
def pinned(threads: int | None = None) -> Iterator[list[int]]:
    """Sets torch's number of threads and binds this process to as many cores, until the block ends.

    Threads may move among these cores only. They are the first that the process may use (``taskset`` selects others),
    one logical CPU of each core before the second of any core.

    Args:
        threads: torch's threads; None leaves the number as it is.

    Yields:
        The logical CPUs; an empty list if the system cannot bind threads.
    """
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    allowed: dict[int, set[int]] = {}  # by thread: torch's existing threads do not follow the main thread
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
    """Orders logical CPUs: one of each core, then the rest."""
    seen: dict[str, int] = {}

    def place(cpu: int) -> tuple[int, int]:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(cpu)
        seen[core] = seen.get(core, 0) + 1
        return seen[core], cpu

    return sorted(sorted(cpus), key=place)

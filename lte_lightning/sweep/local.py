"""Fits as processes of this machine."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lte_lightning.errors import UserError

PROGRAM = (sys.executable, "-m", "lte_lightning")


class LocalRunner:
    """Runs commands on this machine, several at a time.

    Each gets ``cores // workers`` threads, so that all together use no more than the machine has, or as many as
    OMP_NUM_THREADS says.

    Args:
        workers: Commands at a time.
        program: What is put before a command's words.
        inherited: A file descriptor that every process keeps open, the lock of the sweep's folder.

    Raises:
        UserError: If there is no worker.
    """

    def __init__(self, workers: int = 1, program: tuple[str, ...] = PROGRAM, inherited: int | None = None) -> None:
        if workers < 1:
            raise UserError(f"workers is {workers}; it must be at least 1")
        self.slots = workers
        self.program = program
        self.inherited = inherited
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = int(wanted) if wanted.isdecimal() and int(wanted) else max(1, cores() // workers)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, words: list[str], log: Path) -> None:
        """Starts a command, and appends its output to the log."""
        with log.open("ab") as output:
            self._running[name] = subprocess.Popen(
                [*self.program, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(self.threads),
                pass_fds=() if self.inherited is None else (self.inherited,),
                preexec_fn=_in_child if os.name == "posix" else None,
            )

    def wait(self, patience: float) -> tuple[str, int] | None:
        """Returns the name and the exit code of the next command that ends; None if none does within some seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for name, process in self._running.items():
                if process.poll() is not None:
                    del self._running[name]
                    return name, process.returncode
            time.sleep(0.05)
        return None

    def stop(self, patience: float = 60) -> None:
        """Ends all commands, by an interrupt first, which lets a fit keep its last checkpoint."""
        for process in self._running.values():
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + patience
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(threads: int) -> dict[str, str]:
    """Returns the environment of a fit that computes on so many threads."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _in_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores interrupts, and so would its fits
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: when a sweep is killed, its fits get a SIGTERM from the kernel
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

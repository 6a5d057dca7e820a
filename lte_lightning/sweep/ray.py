"""Fits as tasks of a Ray cluster."""

import contextlib
import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from lte_lightning.bars import say
from lte_lightning.errors import UserError
from lte_lightning.network import reach
from lte_lightning.sweep.local import PROGRAM, environment

# The variables that a fit gets from where the sweep was started
SHIPPED = ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONPATH", "HF_", "MLFLOW_", "TOKENIZERS_PARALLELISM")
ANSWER = 20  # seconds that a cluster has to answer in


class RayRunner:
    """Runs commands as tasks of a Ray cluster, which decides where.

    All machines see the sweep's folder, the data and this package under the same paths, as on a shared file system.
    When the sweep ends or is killed, Ray ends its tasks. A fit has the environment of its machine, and of the sweep's
    the variables that begin with one of ``SHIPPED``.

    Args:
        address: ``host:port`` of the cluster, ``ray://host:port``, ``auto`` for the one that runs on this machine, or
            ``local`` to start one here that ends with the sweep.
        workers: Commands at a time; by default as many as the cluster has room for.
        cpus: Cores per command, and its threads.
        gpus: GPUs per command.
        program: What is put before a command's words.

    Raises:
        UserError: If Ray is not installed, nobody answers at the address, or the cluster has no room for one command.
    """

    def __init__(
        self,
        address: str,
        workers: int | None = None,
        cpus: int = 1,
        gpus: float = 0,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        if cpus < 1 or gpus < 0 or (workers is not None and workers < 1):
            raise UserError(f"cpus {cpus}, gpus {gpus}, workers {workers}: a fit takes at least one core, and a worker")
        try:
            import ray
        except ImportError as error:
            raise UserError('--ray-address needs Ray: pip install "lte-lightning[sweep]"') from error
        if address not in ("local", "auto"):
            reach(address, "a Ray cluster")  # Ray itself would try for a minute
            if "://" not in address:
                _check(address)
        self._ray = ray
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot join a Ray cluster at {address!r}: {reason}; start one, or leave it out"
            ) from error
        # Room of each machine by itself: a fit that fits on no machine would wait for ever
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        rooms = [(machine.get("CPU", 0), machine.get("GPU", 0)) for machine in machines]
        slots = sum(math.floor(min(c / cpus, g / gpus if gpus else math.inf)) for c, g in rooms)
        if slots < 1:
            ray.shutdown()
            found = ", ".join(f"{c:g} cores and {g:g} GPUs" for c, g in sorted(set(rooms), reverse=True))
            raise UserError(
                f"no machine of the Ray cluster has room for a fit: there are some of {found}, and a fit takes {cpus} "
                f"and {gpus:g}: lower --cpus or --gpus"
            )
        self.slots = min(slots, workers or slots)
        self.program, self.threads = program, cpus
        # By value, so that Ray's workers do not import this package, and torch with it, to start a process
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run)
        self._running: dict[Any, str] = {}

    def start(self, name: str, words: list[str], log: Path) -> None:
        """Starts a command, and appends its output to the log."""
        # A machine has an environment of its own; it is given what the fits of this sweep have in common
        inherited = environment(self.threads)
        variables = {key: value for key, value in inherited.items() if key.startswith(SHIPPED)}
        command = [*self.program, *words]
        self._running[self._task.remote(command, os.getcwd(), variables, str(log))] = name

    def wait(self, patience: float) -> tuple[str, int] | None:
        """Returns the name and the exit code of the next command that ends; None if none does within some seconds."""
        ended_tasks, _ = self._ray.wait(list(self._running), num_returns=1, timeout=patience)
        if not ended_tasks:
            return None
        (ended,) = ended_tasks
        name = self._running.pop(ended)
        try:
            return name, self._ray.get(ended)
        except self._ray.exceptions.RayError as error:  # the machine is gone, or Ray had no memory left for it
            say(f"{name}: {' '.join(str(error).split())[:300]}", sys.stderr)
            return name, -1

    def stop(self, patience: float = 60) -> None:
        """Ends all commands, by an interrupt first, and waits until they have ended."""
        for task in self._running:
            self._ray.cancel(task, force=False)
        still_running = self._wait_for_all(patience)
        for task in still_running:
            self._ray.cancel(task, force=True)
        self._wait_for_all(10)
        self._running.clear()
        self._ray.shutdown()

    def _wait_for_all(self, patience: float) -> list[Any]:
        if not self._running:
            return []
        _, still_running = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=patience)
        return still_running


def _check(address: str) -> None:
    """Checks the health of a cluster's head: on a port of another program, Ray itself would wait for ever.

    Raises:
        UserError: If no head of a cluster answers.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        well = subprocess.run(command, capture_output=True, timeout=ANSWER).returncode == 0
    except subprocess.TimeoutExpired:
        well = False
    if not well:
        raise UserError(
            f"what listens at {address} does not answer as the head of a Ray cluster does; give the address that "
            "`ray start --head` printed"
        )


def _run(command: list[str], cwd: str, variables: dict[str, str], log: str) -> int:
    """Runs a command on the machine that Ray chose, with the variables of the sweep and the GPUs of the task.

    It locks its log while it runs, so that a restarted sweep knows which fits to wait for.
    """

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # Ray's workers hold interrupts back
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform == "linux":  # PR_SET_PDEATHSIG: Ray kills the worker of a sweep that was killed
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    with open(log, "ab") as output:
        with contextlib.suppress(ImportError, OSError):  # not every shared file system has locks
            import fcntl

            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=in_child,
        )
    try:
        while process.poll() is None:  # Ray's interrupt does not reach a thread that waits for a process
            time.sleep(0.1)
    except BaseException:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray may interrupt again what does not end at once
        process.send_signal(signal.SIGINT)  # which lets a fit keep its last checkpoint
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(50)
        process.kill()
        process.wait()
        signal.signal(signal.SIGINT, handler)
        raise
    return process.returncode

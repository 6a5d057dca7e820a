"""The machine and the code behind a result."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lte_lightning.kernels.cpu.processor import cpu_facts

PACKAGE = Path(__file__).parents[1]


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the models of ``cpu`` and ``gpu`` (None without one), the usable ``cores``, and ``memory_gib``."""
    affinity = getattr(os, "sched_getaffinity", None)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu_facts().get("model name") or platform.processor() or platform.machine(),
        "gpu": gpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": _memory_gib(),
    }


def code(package: Path = PACKAGE) -> dict[str, str | None]:
    """Returns ``commit`` from ``git describe``, and ``code``, a short hash over the package's Python files.

    The commit is None unless the package lies at the top of a git repository that tracks it. A repository around a
    virtual environment belongs to another project.
    """
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return {"commit": _commit(package), "code": digest.hexdigest()[:12]}


def _commit(package: Path) -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve():
            return None
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None

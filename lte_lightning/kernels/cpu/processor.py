"""Facts about the machine's processor, from Linux or macOS."""

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path


@cache
def cpu_facts() -> dict[str, str]:
    """Returns the entries of /proc/cpuinfo for the first processor, by key; nothing on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))  # reversed, so that a key's first value wins
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Returns Linux's names of the processor's features; nothing on other systems than Linux and macOS."""
    if sys.platform == "darwin":
        return _apple_flags()
    facts = cpu_facts()
    return frozenset((facts.get("flags") or facts.get("Features", "")).split())  # x86, ARM


@cache
def _apple_flags() -> frozenset[str]:
    try:
        command = ["sysctl", "hw.optional.arm"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # an Intel Mac has no such entries
        return frozenset()
    names = {"hw.optional.arm.FEAT_DotProd: 1": "asimddp", "hw.optional.arm.FEAT_I8MM: 1": "i8mm"}
    return frozenset(names[line.strip()] for line in lines if line.strip() in names)


def processor() -> str:
    """Returns the processor's name with its family and model, because a name may be as plain as ``AMD EPYC``."""
    facts = cpu_facts()
    name = facts.get("model name")
    return (
        f"{name} (family {facts.get('cpu family', '')}, model {facts.get('model', '')})" if name else platform.machine()
    )

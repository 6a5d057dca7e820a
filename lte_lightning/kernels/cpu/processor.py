"""Facts about the machine's processor, from Linux."""

import platform
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
    """Returns the names of the processor's features; nothing on other systems."""
    return frozenset(cpu_facts().get("flags", "").split())


def processor() -> str:
    """Returns the processor's name with its family and model, because a name may be as plain as ``AMD EPYC``."""
    facts = cpu_facts()
    name = facts.get("model name")
    return (
        f"{name} (family {facts.get('cpu family', '')}, model {facts.get('model', '')})" if name else platform.machine()
    )

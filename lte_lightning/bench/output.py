"""Prints benchmark results and writes their CSV file."""

import csv
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lte_lightning.bench.context import Score
from lte_lightning.bench.timing_row import Timing
from lte_lightning.files import whole_file


def say_where(device: torch.device, cores: Sequence[int]) -> None:
    """Prints the machine and, if it is busy, a warning."""
    count, load = os.cpu_count() or 1, os.getloadavg()[0]
    threads = counted(torch.get_num_threads(), "thread")
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    print(
        f"{gpu}{platform.machine()}, {count} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, {threads} on cores {named(cores)}, load {load:.2f}"
    )
    if load > 0.25 * count:
        print(f"warning: this machine is busy (load {load:.2f} on {count} cores); expect noise", file=sys.stderr)


def named(cores: Sequence[int]) -> str:
    """Returns the cores as text."""
    return ",".join(map(str, cores)) or "of the system's choice"


def counted(count: int, what: str) -> str:
    """Returns ``1 token`` or ``2 tokens``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def show(timings: list[Timing], samples: dict[Any, list[float]], layers: int) -> None:
    """Prints the rows of one measurement as a table."""
    first = timings[0]
    low, high = quartiles(samples["dense"])
    print(
        f"\n{first.shape} {first.scope}, {first.phase}, {first.dtype}, {counted(first.tokens, 'token')}, "
        f"{counted(layers, 'layer')}: "
        f"dense {first.dense_ms:.3f} ms [{low:.3f} .. {high:.3f}], router {first.router_ms:.3f} ms"
    )
    print(f"{'sparsity':>8}  {'backend':16}{'ms':>10}  {'quartiles':^21}{'ratio':>7}{'bound':>7}{'share':>7}")
    for f in timings:
        low, high = quartiles(samples[f.sparsity, f.backend])
        print(
            f"{f.sparsity:8.0%}  {f.backend:16}{f.ms:10.3f}  {f'{low:.3f} .. {high:.3f}':^21}"
            f"{f.ratio:7.2f}{f.bound:7.2f}{f.share_of_bound:7.0%}"
        )


def quartiles(times: list[float]) -> tuple[float, float]:
    """Returns the lower and the upper quartile."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return low, high


def write_table(timings: Sequence[Timing | Score], path: Path) -> None:
    """Writes one row per measurement, with a column for each field."""
    with whole_file(path, newline="") as file:
        writer = csv.DictWriter(file, as_row(timings[0]))
        writer.writeheader()
        writer.writerows(map(as_row, timings))


def as_row(row: Timing | Score) -> dict[str, Any]:
    """Returns a CSV row, with floats to four significant digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(row).items()}

"""Measures start-up: processor time (user and system) of imports and help texts, each in a separate process.

python benchmarks/startup.py            # medians of five runs, interleaved
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version

CLI = ("-m", "lte_lightning")
STARTS = {
    "import torch": ("-c", "import torch"),
    "import lte_lightning": ("-c", "import lte_lightning"),
    "import lte_lightning, torch": ("-c", "import lte_lightning, torch"),
    "lte_lightning.convert": ("-c", "import lte_lightning; lte_lightning.convert"),
    "import lightning.pytorch.cli": ("-c", "import lightning.pytorch.cli"),
    "lte --version": (*CLI, "--version"),
    "lte --help": (*CLI, "--help"),
    **{f"lte {name} --help": (*CLI, name, "--help") for name in ("fit", "sweep", "report", "bench", "cost", "harness")},
}


def seconds(words: tuple[str, ...], cache: str) -> float:
    before = os.times()
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each (default: %(default)s)")
    runs = parser.parse_args().runs
    first: dict[str, list[float]] = {name: [] for name in STARTS}
    again: dict[str, list[float]] = {name: [] for name in STARTS}
    for words in STARTS.values():  # fill the caches of bytecode and disk first
        with tempfile.TemporaryDirectory() as cache:
            seconds(words, cache)
    for _ in range(runs):
        for name, words in STARTS.items():
            with tempfile.TemporaryDirectory() as cache:  # the folder for cached help texts
                first[name].append(seconds(words, cache))
                again[name].append(seconds(words, cache))
    print(
        f"python {platform.python_version()}, torch {version('torch')}, lightning {version('lightning')}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; seconds of processor time, medians of {runs}"
    )
    print(f"{'':30s}{'first':>8s}{'again':>8s}")
    for name in STARTS:
        print(f"{name:30s}{statistics.median(first[name]):8.2f}{statistics.median(again[name]):8.2f}")


if __name__ == "__main__":
    main()

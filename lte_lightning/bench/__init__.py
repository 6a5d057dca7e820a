"""``lte bench``: time the sparse model against the dense one on this machine, in one process."""

from lte_lightning.bench.command import main

__all__ = ["main"]

"""``lte bench``: what skipping experts saves on this machine, against the dense model, in one process."""

from lte_lightning.bench.command import main

__all__ = ["main"]

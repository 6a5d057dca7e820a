"""Which experts run for a token: LTE's router and what it is compared with, one small file each.

A selector is a module that maps the FFN input ``x_BTD`` to ``scores_BTE`` in [0, 1], in float32; an expert runs in hard
mode when its score exceeds the threshold.
"""

from torch import nn

from lte_lightning.selection.none import NoExperts
from lte_lightning.selection.router import Router

SELECTORS: dict[str, type[nn.Module]] = {"router": Router, "none": NoExperts}

__all__ = ["SELECTORS", "NoExperts", "Router"]

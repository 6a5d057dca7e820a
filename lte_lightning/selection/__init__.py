"""Which experts run for a token: LTE's router and what it is compared with, one small file each.

A `Selector` is a module that maps the FFN input ``x_BTD`` to ``scores_BTE`` in [0, 1], in float32, and says what it is
charged for; an expert runs in hard mode when its score exceeds the threshold.
"""

from lte_lightning.selection.base import Selector
from lte_lightning.selection.none import NoExperts
from lte_lightning.selection.router import Router

SELECTORS: dict[str, type[Selector]] = {"router": Router, "none": NoExperts}

__all__ = ["SELECTORS", "NoExperts", "Router", "Selector"]

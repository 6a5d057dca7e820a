"""Which experts run for a token: LTE's router and the methods beside it.

A `Selector` is a module that maps its input, mostly the FFN input ``x_BTD``, to ``scores_BTE`` in [0, 1], in
float32. Its attributes say what it needs, how it learns and what it costs. To add one, write a file beside these, with
`register_selector` above the class, and name the file below. Another package calls `register_selector` by itself.
"""

from lte_lightning.selection import (  # noqa: F401 - each registers its selector
    cats,
    chance,
    d2dmoe,
    dejavu,
    kla,
    moefication,
    narrow,
    none,
    router,
    sigmamoe,
    softmax,
    teal,
    wanda,
)
from lte_lightning.selection.base import Selector
from lte_lightning.selection.facts import Activity, Description, Ffn, FfnShape, ModelShape
from lte_lightning.selection.gates import Gates
from lte_lightning.selection.none import NoExperts
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.ranking import Ranking
from lte_lightning.selection.registry import (
    SELECTORS,
    import_selector,
    register_selector,
    selector_class,
    selector_names,
)
from lte_lightning.selection.router import Router

__all__ = [
    "SELECTORS",
    "Activity",
    "Description",
    "Ffn",
    "FfnShape",
    "Gates",
    "ModelShape",
    "NoExperts",
    "Predictor",
    "Ranking",
    "Router",
    "Selector",
    "import_selector",
    "register_selector",
    "selector_class",
    "selector_names",
]

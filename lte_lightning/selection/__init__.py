"""Which experts run for a token: LTE's router and what it is compared with.

A `Selector` is a module that maps what it reads, mostly the FFN input ``x_BTD``, to ``scores_BTE`` in [0, 1], in
float32, and says what it is charged for; an expert runs in hard mode when its score exceeds the threshold. All but the
router reach a sparsity that is asked for, and share a constructor: sizes, sparsity, generator.
"""

from lte_lightning.selection.base import FfnShape, Selector
from lte_lightning.selection.cats import Cats
from lte_lightning.selection.chance import RandomRouter
from lte_lightning.selection.d2dmoe import D2dmoe
from lte_lightning.selection.dejavu import DejaVu
from lte_lightning.selection.gates import Gates
from lte_lightning.selection.kla import KeepLargest
from lte_lightning.selection.moefication import Moefication
from lte_lightning.selection.narrow import Narrow
from lte_lightning.selection.none import NoExperts
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.ranking import Ranking
from lte_lightning.selection.router import Router
from lte_lightning.selection.sigmamoe import SigmaMoe
from lte_lightning.selection.softmax import NoisySoftmax
from lte_lightning.selection.teal import Teal
from lte_lightning.selection.wanda import Wanda

RANKINGS: dict[str, type[Ranking]] = {
    "cats": Cats,
    "d2dmoe": D2dmoe,
    "dejavu": DejaVu,
    "kla": KeepLargest,
    "moefication": Moefication,
    "narrow": Narrow,
    "none": NoExperts,
    "random": RandomRouter,
    "sigmamoe": SigmaMoe,
    "softmax": NoisySoftmax,
    "teal": Teal,
    "wanda": Wanda,
}
SELECTORS = ("router", *RANKINGS)

__all__ = [
    "RANKINGS",
    "SELECTORS",
    "FfnShape",
    "Gates",
    "NoExperts",
    "Predictor",
    "Ranking",
    "Router",
    "Selector",
    "Teal",
    "Wanda",
]

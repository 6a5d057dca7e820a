"""CATS: a threshold on the activated gate."""

from lte_lightning.selection.magnitude import Magnitude
from lte_lightning.selection.registry import register_selector


@register_selector("cats")
class Cats(Magnitude):
    """CATS: a threshold on the |activated gate|, one per layer, calibrated on training rows.

    Source: Donghyun Lee, Je-Yong Lee, Genghan Zhang, Mo Tiwari, Azalia Mirhoseini: "CATS: Contextually-Aware
    Thresholding for Sparsity in Large Language Models", COLM 2024, arXiv 2404.08763. Its activation: z where |z| >= t,
    else 0, for z = SiLU(x W_gate); t is the quantile of |z| at the sparsity asked for.

    Cost: the whole gate projection (of an FFN without a gate, the up projection), computed for every neuron. It is not
    an oracle, because it pays for what it reads. Each layer's level is calibrated on inputs from layers that are sparse
    already, because the sparsity would otherwise miss its target; the authors calibrate on the dense model.
    """

    label = "CATS"
    caveat = "pays for the whole gate"
    rule = "level"
    reads = "gate"

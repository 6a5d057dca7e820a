"""Keep the largest activations: the paper's oracle, and MoEfication's ground truth."""

from lte_lightning.selection.magnitude import Magnitude


class KeepLargest(Magnitude):
    """KLA of the paper's section 5.1: keeps the neurons with the largest |activation|, per token.

    An oracle: it reads the activations that it saves, and is charged nothing for them. With experts of one neuron it is
    the paper's baseline; with larger ones, whose |activations| are summed, it is the ground truth of MoEfication
    (Zhang et al. 2022), which for ReLU sums the positive activations.
    """

    reads = "hidden"

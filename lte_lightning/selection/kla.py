"""Keep the largest activations: the paper's oracle, and MoEfication's ground truth."""

from lte_lightning.selection.magnitude import Magnitude
from lte_lightning.selection.registry import register_selector


@register_selector("kla")
class KeepLargest(Magnitude):
    """KLA, keep the largest activations: per token the neurons whose |activation| is largest.

    Source: the paper (see `Router`), section 5.1, with experts of one neuron: the k largest |h_i| of the hidden
    activations h. With larger ones, whose |activations| are summed, it is the ground truth of MoEfication (see
    `Moefication`), which for ReLU sums the positive activations.

    An oracle: it reads the activations that it saves, and is charged nothing for them.
    """

    label = "KLA (oracle)"
    caveat = "oracle"
    oracle = True
    reads = "hidden"

    @classmethod
    def display_name(cls, expert_size: int | None, target_sparsity: float | None) -> str:
        """Returns the label; with experts of several neurons, that of MoEfication's ground truth."""
        return cls.label if expert_size in (1, None) else "MoEfication, ground truth (oracle)"

    @classmethod
    def name_if_missing(cls, expert_size: int | None) -> str:
        """Returns the name of the method for this expert size."""
        return "KLA of single neurons" if expert_size in (1, None) else "MoEfication's ground truth"

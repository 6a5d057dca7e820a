"""A narrower dense FFN."""

from lte_lightning.selection.magnitude import Magnitude
from lte_lightning.selection.registry import register_selector


@register_selector("narrow")
class Narrow(Magnitude):
    """A narrower dense FFN: for every token the experts whose activations are largest on average on training rows.

    The baseline for selection per token: its selection costs nothing. It is not a published method, but structured
    pruning by the mean |activation|.
    """

    label = "narrower dense"
    rule = "fixed"
    reads = "hidden"

    @classmethod
    def display_name(cls, expert_size: int | None, target_sparsity: float | None) -> str:
        """Returns the label; at sparsity 0 it is the dense model, trained as long as the others."""
        if target_sparsity == 0:
            return "dense, trained on"
        return f"{cls.label}, single neurons" if expert_size == 1 else cls.label

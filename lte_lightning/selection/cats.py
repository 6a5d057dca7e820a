"""CATS: a threshold on the activated gate."""

from lte_lightning.selection.magnitude import Magnitude


class Cats(Magnitude):
    """CATS (Lee et al. 2024): a threshold on the |activated gate|, one per layer, calibrated on training rows.

    Charged the gate projection (of a plain FFN: the up projection) whole, since every neuron's is computed. No oracle:
    what it reads it has paid for. Each layer's level is calibrated behind layers that are sparse already, or the
    sparsity that is asked for would be missed; the authors calibrate on the dense model.
    """

    rule = "level"
    reads = "gate"

    def whole_projections(self) -> int:
        """Returns 1: the gate, or up, projection."""
        return 1

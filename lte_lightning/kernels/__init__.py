"""Ways to run selected experts: tensors in, tensors out, torch only."""

from lte_lightning.kernels.dense_mask import scale_experts
from lte_lightning.kernels.layout import hidden_activations

__all__ = ["hidden_activations", "scale_experts"]

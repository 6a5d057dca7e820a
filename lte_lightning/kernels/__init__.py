"""Ways to run selected experts: tensors in, tensors out, torch only."""

from lte_lightning.kernels.dense_mask import scale_experts

__all__ = ["scale_experts"]

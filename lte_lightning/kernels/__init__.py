"""Kernels that run selected experts. They take and return tensors, and depend on torch alone."""

from lte_lightning.kernels.dense_mask import scale_experts
from lte_lightning.kernels.layout import hidden_activations

__all__ = ["hidden_activations", "scale_experts"]

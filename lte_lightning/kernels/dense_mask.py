"""The dense-mask backend: every expert is computed, and what each adds is scaled; differentiable."""

import torch


def scale_experts(hidden_BTF: torch.Tensor, factor_BTE: torch.Tensor) -> torch.Tensor:
    """Scales each expert's slice of the hidden activations.

    Args:
        hidden_BTF: Activations whose neurons are ordered by expert, F = E * S.
        factor_BTE: What to scale each expert by: scores (equation 3) or a 0/1 mask (equation 2); any type.

    Returns:
        The scaled activations, [B, T, F], in their own type.
    """
    factor_BTE1 = factor_BTE.to(hidden_BTF.dtype).unsqueeze(-1)
    return (hidden_BTF.unflatten(-1, (factor_BTE.shape[-1], -1)) * factor_BTE1).flatten(-2)

"""The two losses that LTE adds to the task's in its first stage, in float32."""

from collections.abc import Sequence

import torch

SEPARABILITY_EPSILON = 0.01


def efficiency_loss(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared score (equation 4): what pushes scores down.

    Args:
        scores: One tensor [N, E] per layer: the scores of the N real tokens.

    Returns:
        A scalar in [0, 1]: the mean over layers of the mean over tokens and experts.
    """
    return torch.stack([scores_NE.float().square().mean() for scores_NE in scores]).mean()


def separability_loss(
    scores: Sequence[torch.Tensor], threshold: float, epsilon: float = SEPARABILITY_EPSILON
) -> torch.Tensor:
    """Mean of ``1 / ((score - threshold)^2 + epsilon)`` (equation 5): what pushes scores away from the threshold.

    The paper has no epsilon, and a pole at the threshold. With 0.01 a score on the threshold costs 100, one at 0 or 1
    costs 3.85 (the paper's floor is 4, for a threshold of 0.5), and the gradient is at most 650 per score, reached at a
    distance of 0.058; it vanishes on the threshold itself.

    Args:
        scores: One tensor [N, E] per layer: the scores of the N real tokens.
        threshold: tau.
        epsilon: Keeps the loss finite.

    Returns:
        A scalar: the mean over layers of the mean over tokens and experts.
    """
    terms = [((scores_NE.float() - threshold).square() + epsilon).reciprocal().mean() for scores_NE in scores]
    return torch.stack(terms).mean()

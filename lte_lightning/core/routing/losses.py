"""The two losses that LTE adds to the task's loss in the router stage (stage 1 of the paper), in float32.

Source: equations 4 and 5 of the paper, arXiv 2402.06126 (cited in full in ``lte_lightning/selection/router.py``).
"""

from collections.abc import Sequence

import torch

SEPARABILITY_EPSILON = 0.01


def efficiency_loss(scores: Sequence[torch.Tensor], weights_L: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared score (equation 4), which pushes scores down.

    Args:
        scores: One tensor [N, E] per layer: the scores of the N real tokens.
        weights_L: Weights per layer, with which the batches of an optimizer step add up to the mean over its tokens.

    Returns:
        A scalar in [0, 1]: the mean over layers of the mean over tokens and experts.
    """
    return _over_layers([scores_NE.float().square().mean() for scores_NE in scores], weights_L)


def separability_loss(
    scores: Sequence[torch.Tensor],
    threshold: float,
    epsilon: float = SEPARABILITY_EPSILON,
    weights_L: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of ``1 / ((score - threshold)^2 + epsilon)`` (equation 5), which pushes scores away from the threshold.

    The paper has no epsilon, so its loss has a pole at the threshold. With 0.01, a score on the threshold costs 100 and
    a score of 0 or 1 costs 3.85 (the paper's minimum is 4, for a threshold of 0.5). The gradient per score is at most
    650, at a distance of 0.058 from the threshold; it vanishes on the threshold itself.

    Args:
        scores: One tensor [N, E] per layer: the scores of the N real tokens.
        threshold: tau.
        epsilon: Keeps the loss finite.
        weights_L: As for `efficiency_loss`.

    Returns:
        A scalar: the mean over layers of the mean over tokens and experts.
    """
    terms = [((scores_NE.float() - threshold).square() + epsilon).reciprocal().mean() for scores_NE in scores]
    return _over_layers(terms, weights_L)


def _over_layers(means: Sequence[torch.Tensor], weights_L: torch.Tensor | None) -> torch.Tensor:
    means_L = torch.stack(list(means))
    return (means_L if weights_L is None else means_L * weights_L).mean()

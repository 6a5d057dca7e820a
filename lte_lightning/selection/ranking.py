"""Selectors that rank experts by an importance and keep the first: by number per token, or above a level per layer."""

from typing import ClassVar, Literal

import torch

from lte_lightning.selection.base import FfnShape, Selector


class Ranking(Selector):
    """Keeps the most important experts; a subclass says how important each is.

    The rule ``top`` keeps the same number for every token. ``level`` keeps those above a level of the layer, which
    `calibrate` sets to a quantile seen on training rows; ``common`` those above one level of all layers, which
    ``core/calibrate.py`` looks for; before that every expert runs. ``fixed`` keeps for all tokens those that are most
    important on average over training rows.

    Args:
        shape: The FFN's sizes.
        sparsity: Share of the experts that shall not run.
        generator: Source of initial weights.
    """

    rule: ClassVar[Literal["top", "level", "common", "fixed"]] = "top"
    level: torch.Tensor
    chosen_E: torch.Tensor

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.sparsity = sparsity
        self.keep = round((1.0 - sparsity) * shape.experts)
        if self.rule in ("level", "common"):
            self.register_buffer("level", torch.tensor(-torch.inf))
        elif self.rule == "fixed":
            self.register_buffer("chosen_E", torch.ones(shape.experts))

    def importance(self, given: torch.Tensor) -> torch.Tensor:
        """Returns how important each expert is for each token, [..., E], float32, from what the selector reads."""
        raise NotImplementedError(f"{type(self).__name__} must define importance")

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Returns 1 for the experts that are kept and 0 for the others, [B, T, E], float32."""
        if self.rule == "fixed":
            return self.chosen_E.float().expand(*given.shape[:-1], -1)
        importance = self.importance(given)
        if self.rule in ("level", "common"):
            return (importance > self.level).float()
        best = importance.topk(self.keep, dim=-1, sorted=False).indices  # sorted takes twice as long
        return torch.zeros_like(importance).scatter_(-1, best, 1.0)

    @property
    def reachable(self) -> bool:
        """Whether the sparsity asked for leaves an expert to run: at least one does, by any rule but ``level``."""
        if self.rule == "common":  # the largest share of a token is 1, and exceeds every level
            return (1.0 - self.sparsity) * self.shape.experts > 1.0 - 1e-6
        return self.rule == "level" or self.keep > 0

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` must be called before the first choice."""
        return self.rule != "top"

    @torch.no_grad()
    def calibrate(self, importance_NE: torch.Tensor) -> None:
        """Sets the level, or the fixed choice, from the importance of N tokens of the training rows."""
        if self.rule == "fixed":
            best = importance_NE.mean(0).topk(self.keep).indices
            self.chosen_E.zero_()[best] = 1.0
        elif self.rule == "level":
            self.level.fill_(level_of(importance_NE.flatten().sort().values, self.sparsity))

    def flops_per_token(self) -> int:
        """Returns 2 FLOPs for every weight of the ranking's own matrices."""
        return 2 * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)

    def magnitude(self, neurons: torch.Tensor) -> torch.Tensor:
        """Sums the magnitudes of neurons [..., F] over each expert, [..., E], float32."""
        return neurons.abs().float().unflatten(-1, (self.shape.experts, -1)).sum(-1)


def level_of(ascending: torch.Tensor, share: float) -> float:
    """Returns the level that a share of sorted values does not exceed; minus infinity for none of them."""
    cut = round(share * len(ascending))
    return float(ascending[cut - 1]) if cut else -torch.inf

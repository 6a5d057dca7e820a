"""Selectors that rank experts by importance and keep the first: a number per token, or those above a level."""

from typing import ClassVar, Literal

import torch

from lte_lightning.errors import UserError
from lte_lightning.selection.base import Calibration, Selector
from lte_lightning.selection.facts import Activity, Ffn, FfnShape, Options

Rule = Literal["top", "level", "common", "fixed"]
_CALIBRATION: dict[Rule, Calibration] = {"top": "none", "level": "sequential", "common": "common", "fixed": "dense"}


class Ranking(Selector):
    """Keeps the most important experts; a subclass says how important each is.

    The rule ``top`` keeps the same number for every token. ``level`` keeps the experts above a level of the layer,
    which `calibrate` sets to a quantile of training rows. ``common`` keeps the experts that reach one level of all
    layers, which ``core/routing/calibrate.py`` searches; until then every expert runs. ``fixed`` keeps the same experts
    for all tokens: those with the largest mean importance over training rows. The rule decides how a subclass is
    calibrated, unless the subclass does.

    Args:
        shape: The FFN's sizes.
        sparsity: Share of the experts that shall not run.
        generator: Source of initial weights.
    """

    graded = False
    rule: ClassVar[Rule] = "top"
    level: torch.Tensor
    chosen_E: torch.Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.rule not in _CALIBRATION:
            raise UserError(f"{cls.__name__} has the rule {cls.rule!r}; there are {', '.join(_CALIBRATION)}")
        if "rule" in vars(cls) and "calibration" not in vars(cls):
            cls.calibration = _CALIBRATION[cls.rule]

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.sparsity = sparsity
        self.keep = round((1.0 - sparsity) * shape.experts)
        if self.rule in ("level", "common"):
            self.register_buffer("level", torch.tensor(-torch.inf))
        elif self.rule == "fixed":
            self.register_buffer("chosen_E", torch.ones(shape.experts))

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Returns the methods that the class must define and does not."""
        ranks = cls.forward is Ranking.forward and cls.importance is Ranking.importance
        return super().missing_methods() + ["importance"] * ranks

    @classmethod
    def make(cls, shape: FfnShape, options: Options, generator: torch.Generator | None) -> Selector:
        """Returns the selector of one FFN; with no target sparsity, nothing runs."""
        return cls(shape, 1.0 if options.target_sparsity is None else options.target_sparsity, generator)

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns how important each expert is for each token, [..., E], float32, from what the selector reads."""
        raise NotImplementedError(f"{type(self).__name__} must define importance")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns 1 for the experts that are kept and 0 for the others, [B, T, E], float32."""
        if self.rule == "fixed":
            return self.chosen_E.float().expand(*inputs.shape[:-1], -1)
        importance = self.importance(inputs)
        if self.rule == "level":
            return (importance > self.level).float()
        if self.rule == "common":
            return (importance >= self.level).float()
        best = importance.topk(self.keep, dim=-1, sorted=False).indices  # sorting would take twice as long
        return torch.zeros_like(importance).scatter_(-1, best, 1.0)

    @property
    def reachable(self) -> bool:
        """Whether the target sparsity leaves an expert to run; every rule but ``level`` runs at least one."""
        if self.rule == "common":  # a token's best expert has importance 1, above every level
            return (1.0 - self.sparsity) * self.shape.experts > 1.0 - 1e-6
        return self.rule == "level" or self.keep > 0

    def check_sparsity(self, options: Options) -> None:
        """Checks that the sparsity leaves an expert to run.

        Raises:
            UserError: If not; the message names a sparsity that does.
        """
        if self.reachable:
            return
        experts, kept, so = self.shape.experts, "none", "would equal the floor, selector 'none'"
        if self.learns_with_task():
            so = "would have nothing to learn"
        elif self.rule == "common":
            kept, so = "less than one", "runs at least the best of each token"
        nearest = 1000 * (experts - 1) // experts / 1000  # rounded down, so that it is accepted
        raise UserError(
            f"target_sparsity {options.target_sparsity} leaves {kept} of {experts} experts running, and selector "
            f"{options.selector!r} {so}; set it to at most {nearest:g}, or lower expert_size (now "
            f"{options.expert_size})"
        )

    def sample(self, activity: Activity) -> torch.Tensor:
        """Returns how important each expert is for each token, [N, E]."""
        inputs = {"input": activity.x_ND, "gate": activity.gate_NF, "hidden": activity.hidden_NF}[self.reads]
        return self.importance(inputs)

    @torch.no_grad()
    def calibrate(self, sample: torch.Tensor, ffn: Ffn | None = None) -> None:
        """Sets the level, or the fixed choice, from the importance [N, E] of N tokens of the training rows."""
        if self.rule == "fixed":
            best = sample.mean(0).topk(self.keep).indices
            self.chosen_E.zero_()[best] = 1.0
        elif self.rule == "level":
            self.level.fill_(level_of(sample.flatten().sort().values, self.sparsity))

    def set_common_level(self, level: float) -> None:
        """Sets the level that all layers share."""
        self.level.fill_(level)

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

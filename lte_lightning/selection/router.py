"""LTE's router: one linear layer and a sigmoid."""

import math

import torch
from torch import nn

from lte_lightning.errors import UserError
from lte_lightning.selection.base import Calibration, Selector
from lte_lightning.selection.facts import FfnShape, Options
from lte_lightning.selection.registry import register_selector


@register_selector("router")
class Router(Selector):
    """Scores each expert by ``sigmoid(x W_g + b)`` (equation 1 of the paper, plus a bias).

    Source: Haizhong Zheng, Xiaoyan Bai, Xueshen Liu, Z. Morley Mao, Beidi Chen, Fan Lai, Atul Prakash: "Learn To be
    Efficient: Build Structured Sparsity in Large Language Models", NeurIPS 2024, arXiv 2402.06126. Equation 1 is the
    score, equation 2 hard mode, equation 3 soft mode, equations 4 to 6 the losses. Here called "the paper".

    Cost: D * E multiply-adds per token, about 1 % of the FFN. It reads only the FFN's input, so it is not an oracle.

    The paper states no initialisation. Here the weights are drawn from N(0, scale^2 / D), so that inputs of unit root
    mean square give logits of standard deviation ``scale``; the bias starts at ``logit(threshold) + margin``, so that
    with the defaults (0.4 and 2) scores start clearly above the threshold, 5 standard deviations in logits: the
    efficiency loss can then sort experts before the separability loss fixes each on its side.

    Args:
        width: D, the width of the FFN's input.
        experts: E.
        threshold: tau.
        bias: Whether there is a bias; without it logits start around 0 (the paper's equation as it stands).
        margin: Initial distance from the threshold in logits; used only with a bias.
        scale: Initial spread of the logits.
        generator: Source of the initial weights.
        target_sparsity: Share of the experts that shall not run, held by the bias while the router and the model train,
            and calibrated on training rows between the stages. None: sparsity follows from the efficiency loss.
    """

    label = "LTE"
    optional_target = True
    learns = "efficiency"

    def __init__(
        self,
        width: int,
        experts: int,
        threshold: float = 0.5,
        bias: bool = True,
        margin: float = 2.0,
        scale: float = 0.4,
        generator: torch.Generator | None = None,
        target_sparsity: float | None = None,
    ) -> None:
        super().__init__()
        self.threshold_logit = math.log(threshold / (1.0 - threshold))
        self.target_sparsity = target_sparsity
        weight_ED = torch.randn(experts, width, generator=generator) * (scale / math.sqrt(width))
        self.weight = nn.Parameter(weight_ED)
        start = self.threshold_logit + margin
        self.bias = nn.Parameter(torch.full((experts,), start)) if bias else None

    @classmethod
    def check(cls, options: Options) -> None:
        """Checks a configuration that names this selector.

        Raises:
            UserError: If it cannot work with that.
        """
        super().check(options)
        if options.target_sparsity is not None and not options.router_bias:
            raise UserError(
                f"target_sparsity {options.target_sparsity} needs the routers' biases, but router_bias is false; set "
                "it to true, or leave target_sparsity out"
            )

    @classmethod
    def make(cls, shape: FfnShape, options: Options, generator: torch.Generator | None) -> Selector:
        """Returns the router of one FFN."""
        start = options.router_bias, options.router_margin, options.router_scale
        return cls(shape.width, shape.experts, options.threshold, *start, generator, options.target_sparsity)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns scores [B, T, E] in (0, 1), float32 whatever the input's type.

        The sigmoid is computed in float32: in half precision it would land exactly on the threshold, where the
        gradient of the separability loss vanishes.
        """
        return torch.sigmoid(self.logits(x_BTD))

    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the input of the sigmoid, [B, T, E], float32."""
        bias_E = None if self.bias is None else self.bias.to(x_BTD.dtype)
        return nn.functional.linear(x_BTD, self.weight.to(x_BTD.dtype), bias_E).float()

    def controlled(self) -> bool:
        """Says whether there is a target sparsity to be held."""
        return self.target_sparsity is not None

    @torch.no_grad()
    def raise_logits(self, by: torch.Tensor) -> None:
        """Adds a number to every expert's bias."""
        assert self.bias is not None  # `check` sees to it
        self.bias.add_(by)

    def calibrates(self) -> Calibration:
        """Returns ``control`` where there is a target sparsity to be met."""
        return "control" if self.controlled() else "none"

    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Returns its weights, unless a subclass scores in another way."""
        kind = type(self)
        plain = kind.forward is Router.forward and kind.logits is Router.logits
        return (self.weight, self.bias) if plain else None

    def flops_per_token(self) -> int:
        """Returns 2 D E."""
        return 2 * self.weight.numel()

"""What every selector is."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

Reads = Literal["input", "gate", "hidden"]


@dataclass(frozen=True)
class FfnShape:
    """Sizes of an FFN.

    Args:
        width: D.
        experts: E.
        gated: Whether it has a gate projection beside the up projection.
    """

    width: int
    experts: int
    gated: bool = False


class Selector(nn.Module):
    """Maps what it reads to ``scores_BTE`` in [0, 1], float32, and says what that costs.

    ``reads`` is what `forward` is given: the FFN's ``input`` x_BTD; its ``gate`` activations, activation(gate(x)), or
    of a plain FFN activation(up(x)), [B, T, F]; or its ``hidden`` activations, what the down projection is given,
    [B, T, F]. Whoever reads the last knows what it is to predict: an oracle.

    ``scales`` says that an expert's output is multiplied by its score in hard mode, too; those that do not run score 0.
    """

    reads: ClassVar[Reads] = "input"
    scales: ClassVar[bool] = False

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, T, E]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def thin(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what gate and up projection are given of the input in hard mode: all of it, unless it is thinned."""
        return x_BTD, x_BTD

    def used(self, x_BTD: torch.Tensor, scores_BTE: torch.Tensor) -> torch.Tensor | None:
        """Returns the share of the FFN's weights that each token uses, [B, T, 1], float32.

        None if that is the share of the experts that run, as for every selection of experts.
        """
        return None

    def flops_per_token(self) -> int:
        """Returns what this selector itself is charged per token: two FLOPs per multiply-add."""
        raise NotImplementedError(f"{type(self).__name__} must say its flops_per_token")

    def weights_read(self) -> int:
        """Returns how many weights of its own it reads for a token."""
        # random routers have no parameters, but weights
        return max(sum(parameter.numel() for parameter in self.parameters()), self.flops_per_token() // 2)

    def whole_projections(self) -> int:
        """Returns how many of the FFN's projections are computed whole, for every neuron, before the choice."""
        return 0

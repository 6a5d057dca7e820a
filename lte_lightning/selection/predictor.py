"""Networks that learn to predict the activity of an FFN's neurons from its input; the model stays as it is."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.facts import FfnShape
from lte_lightning.selection.ranking import Ranking


class Predictor(Ranking):
    """A ranking by a network of two matrices, trained in the router stage on the dense model's activations.

    Cost: both matrices per token. It reads the FFN's input, so it is no oracle. A subclass defines `inner_width` and
    `imitation_loss`. There are no biases, except in saved models of an earlier version, which had a bias at the output
    of two methods.

    Args:
        shape: The FFN's sizes.
        sparsity: Share of the experts that shall not run.
        generator: Source of the initial weights.
    """

    learns = "imitation"

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        inner = self.inner_width()
        # not nn.Linear: it would take its first weights from the global generator
        self.first = nn.Parameter(torch.randn(inner, shape.width, generator=generator) / shape.width**0.5)
        self.second = nn.Parameter(torch.randn(shape.experts, inner, generator=generator) / inner**0.5)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}bias")
        if stored is not None and self.bias is None:
            self.bias = nn.Parameter(torch.zeros_like(stored, dtype=self.second.dtype, device=self.second.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def inner_width(self) -> int:
        """Returns the width of the network's inner layer."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_width")

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies the inner activation."""
        return first

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [..., E], float32."""
        first = self.inner(functional.linear(x, self.first.to(x.dtype)))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(first, self.second.to(x.dtype), bias).float()

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the prediction."""
        return self.predict(inputs)

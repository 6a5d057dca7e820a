"""MoEfication's learned router."""

import torch
from torch import nn
from torch.nn import functional

from lte_lightning.selection.facts import Activity, FfnShape
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.registry import register_selector


@register_selector("moefication")
class Moefication(Predictor):
    """MoEfication's learned router: a two-layer tanh network of width E picks the top experts.

    Source: Zhengyan Zhang, Yankai Lin, Zhiyuan Liu, Peng Li, Maosong Sun, Jie Zhou: "MoEfication: Transformer
    Feed-forward Layers are Mixtures of Experts", Findings of ACL 2022, arXiv 2110.01786; the learned router is the "MLP
    selection" of its section on expert selection: logits W_2 tanh(W_1 x / |x|), one per expert.

    As in the authors' code it sees the input's direction, has no biases, and ends in a matrix that starts as the
    identity. Binary cross-entropy trains it towards each expert's activation as a share of the largest in the batch.
    With ReLU the label is theirs, the sum of relu(W x / |x|), without biases: what the direction alone activates.

    Cost: D * E + E * E multiply-adds per token. It reads only the FFN's input, so it is not an oracle.

    Differences from the authors:

    - They swap the activation for ReLU and fine-tune first; ``model.activation relu`` in the dense stage does that.
    - At inputs of norm 1, activations other than ReLU are nearly linear. For them the label is the sum of |activation|
      at the input itself.
    - Their first matrix starts at the experts' mean weights, this one at random. Both learn at a rate of 0.01.
    """

    label = "MoEfication"

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.second = nn.Parameter(torch.eye(shape.experts))

    def inner_width(self) -> int:
        """Returns E."""
        return self.shape.experts

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies tanh."""
        return first.tanh()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [..., E], float32, for the direction of x."""
        return super().predict(functional.normalize(x, dim=-1))

    def imitation_loss(self, activity: Activity) -> torch.Tensor:
        """Returns the binary cross-entropy."""
        neurons_NF = activity.hidden_NF
        if self.shape.activation == "relu":
            direction_ND = functional.normalize(activity.x_ND, dim=-1)
            neurons_NF = functional.linear(direction_ND, activity.first_FD.to(direction_ND.dtype)).relu()
        mass_NE = self.magnitude(neurons_NF)
        share_NE = mass_NE / mass_NE.max().clamp_min(1e-9)
        return functional.binary_cross_entropy_with_logits(self.predict(activity.x_ND), share_NE)

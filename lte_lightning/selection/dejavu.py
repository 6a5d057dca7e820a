"""Deja Vu: a low-rank predictor of every neuron's magnitude."""

import math

import torch
from torch.nn import functional

from lte_lightning.selection.facts import Activity
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.registry import register_selector


@register_selector("dejavu")
class DejaVu(Predictor):
    """Deja Vu as the paper (see `Router`) uses it: a low-rank predictor of every neuron's magnitude.

    Source: Zichang Liu, Jue Wang, Tri Dao, Tianyi Zhou, Binhang Yuan, Zhao Song, Anshumali Shrivastava, Ce Zhang,
    Yuandong Tian, Christopher Ré, Beidi Chen: "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time",
    ICML 2023, arXiv 2310.17157; of its predictors the one for MLP blocks.

    Meant for experts of one neuron; of larger ones it predicts the sum. It is trained by squared error on
    |activation| in units of the layer's mean; the authors, whose models have ReLU, classify whether it is above 0. The
    rank is D / 12, as theirs is in OPT-175B (1,000 of 12,288). Charged rank * (D + E) multiply-adds. No oracle. With an
    expert stage it is the paper's fine-tuned variant.
    """

    label = "Deja Vu"

    def inner_width(self) -> int:
        """Returns D / 12, rounded up."""
        return math.ceil(self.shape.width / 12)

    def imitation_loss(self, activity: Activity) -> torch.Tensor:
        """Returns the mean squared error."""
        mass_NE = self.magnitude(activity.hidden_NF)
        return functional.mse_loss(self.predict(activity.x_ND), mass_NE / mass_NE.mean().clamp_min(1e-9))

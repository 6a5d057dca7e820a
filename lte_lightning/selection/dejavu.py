"""Deja Vu: a low-rank predictor of every neuron's activity."""

import math

import torch
from torch.nn import functional

from lte_lightning.selection.facts import Activity
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.registry import register_selector


@register_selector("dejavu")
class DejaVu(Predictor):
    """Deja Vu: a low-rank predictor tells which neurons are active; the top run.

    Source: Zichang Liu, Jue Wang, Tri Dao, Tianyi Zhou, Binhang Yuan, Zhao Song, Anshumali Shrivastava, Ce Zhang,
    Yuandong Tian, Christopher Ré, Beidi Chen: "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time",
    ICML 2023, arXiv 2310.17157; of its predictors the one for MLP blocks: logits W_2 W_1 x, one per neuron.

    As in the authors' code the network is two matrices without biases or an inner activation. Their models have ReLU,
    so the loss has two forms. With ReLU it is theirs: binary cross-entropy towards "is not 0", with more weight on the
    rarer answer. With any other activation no neuron is 0, and the loss is as the paper (see `Router`) describes its
    Deja Vu, "low-rank predictors estimate neuron values": squared error on |activation| in units of the layer's mean.

    It is meant for experts of one neuron. For larger experts it predicts whether any of their neurons is active (ReLU),
    or their summed magnitude. The authors keep neurons whose score exceeds 0.5; here the target sparsity sets their
    number. The rank is D / 12, as theirs is in OPT-175B (1,000 of 12,288). With an expert stage it is the paper's
    fine-tuned variant.

    Cost: rank * (D + E) multiply-adds per token. It reads only the FFN's input, so it is not an oracle.
    """

    label = "Deja Vu"

    def inner_width(self) -> int:
        """Returns D / 12, rounded up."""
        return math.ceil(self.shape.width / 12)

    def imitation_loss(self, activity: Activity) -> torch.Tensor:
        """Returns the weighted binary cross-entropy with ReLU, else the mean squared error."""
        mass_NE, predicted_NE = self.magnitude(activity.hidden_NF), self.predict(activity.x_ND)
        if self.shape.activation != "relu":
            return functional.mse_loss(predicted_NE, mass_NE / mass_NE.mean().clamp_min(1e-9))
        active_NE = (mass_NE > 0.0).float()
        share = active_NE.mean() + 0.005
        weight_NE = active_NE * (1.0 - share) + share
        return functional.binary_cross_entropy_with_logits(predicted_NE, active_NE, weight_NE)

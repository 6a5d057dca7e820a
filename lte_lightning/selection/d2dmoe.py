"""D2DMoE: experts whose predicted output is large relative to the token's largest."""

import torch
from torch.nn import functional

from lte_lightning.selection.facts import Activity
from lte_lightning.selection.predictor import Predictor
from lte_lightning.selection.registry import register_selector


@register_selector("d2dmoe")
class D2dmoe(Predictor):
    """D2DMoE: regresses the norm of each expert's output; dynamic-k.

    Source: Filip Szatkowski, Bartosz Wójcik, Mikołaj Piórczyński, Simone Scardapane: "Exploiting Activation Sparsity
    with Dense to Dynamic-k Mixture-of-Experts Conversion", NeurIPS 2024, arXiv 2310.04361: regression of the experts'
    contributions, and dynamic-k gating; expert e runs where its predicted norm p_e >= (1 - tau) * max p.

    As in the authors' code the network is two layers, 128 wide, without biases, with ReLU inside and the absolute value
    at its end, trained by squared error; 1 - tau is one share for all layers, and a token's best expert always runs.
    They choose tau by hand; here it is calibrated. Before that they fine-tune the dense model towards sparse
    activations, which is left out: all methods start from the same model.

    Cost: 128 * (D + E) multiply-adds per token. It reads only the FFN's input, so it is not an oracle.
    """

    label = "D2DMoE"
    caveat = "without its sparsity fine-tuning"
    rule = "common"

    def inner_width(self) -> int:
        """Returns 128."""
        return 128

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """Applies ReLU."""
        return first.relu()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the norms [..., E], float32."""
        return super().predict(x).abs()

    def importance(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the predicted norms, each as a share of its token's largest; 1 where that is 0, so that all run."""
        norms = self.predict(inputs)
        largest = norms.amax(-1, keepdim=True)
        return torch.where(largest > 0.0, norms / largest, 1.0)

    def imitation_loss(self, activity: Activity) -> torch.Tensor:
        """Returns the mean squared error."""
        down_ESD = activity.down_FD.float().unflatten(0, (self.shape.experts, -1))
        hidden_NES = activity.hidden_NF.float().unflatten(-1, (self.shape.experts, -1))
        # |h W| by the Gram matrix of W: [E, S, S] instead of outputs [N, E, D]
        gram_ESS = down_ESD @ down_ESD.mT
        norm_NE = torch.einsum("nes,est,net->ne", hidden_NES, gram_ESS, hidden_NES).clamp_min(0.0).sqrt()
        return functional.mse_loss(self.predict(activity.x_ND), norm_NE)

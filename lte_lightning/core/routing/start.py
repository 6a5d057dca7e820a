"""Starts routers from the dense model's activations, in closed form, without gradient steps.

Ridge regression on the FFN's input predicts the logarithm of the norm of each expert's output, less its mean over the
token's experts. Source: trials of this project (docs/sparsity.md). D2DMoE predicts the norms themselves, by gradient
steps (Szatkowski and others, NeurIPS 2024, arXiv 2310.04361).

Shape suffixes: N real tokens of a batch, D width, E experts, S neurons per expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lte_lightning.core.model.experts import ExpertFfn, require_expert_ffns
from lte_lightning.core.model.sharding import write
from lte_lightning.core.routing.observe import observe
from lte_lightning.core.routing.prune import Batch
from lte_lightning.core.routing.target_sparsity import Reduce
from lte_lightning.errors import UserError
from lte_lightning.selection import Activity

PENALTY = 0.3
"""Strength of the ridge, in units of the mean variance of an input."""
SPREAD = 1.5
"""Standard deviation of the logits over tokens and experts."""
FLOOR = 1e-6
"""Added to the norms, in units of their median."""


@dataclass
class _Sums:
    """Sums over tokens, float64: of ones, x, y, x x' and x y'."""

    count: torch.Tensor
    x_D: torch.Tensor
    y_E: torch.Tensor
    xx_DD: torch.Tensor
    xy_DE: torch.Tensor


@torch.no_grad()
def start_routers(model: PreTrainedModel, batches: Sequence[Batch], reduce: Reduce = lambda counts: counts) -> None:
    """Sets the routers' weights; `control.rest` sets the level of their biases afterwards.

    Args:
        model: A converted model in eval mode with linear routers that have a bias; its mode is ``dense`` afterwards.
        batches: Training rows.
        reduce: Sums over devices.

    Raises:
        UserError: If the selectors are not linear routers with a bias.
    """
    ffns = list(require_expert_ffns(model).values())
    for ffn in ffns:
        linear = ffn.selector.linear()
        if linear is None or linear[1] is None:
            raise UserError(
                "router_start closed-form needs linear routers with a bias, and this model has none; use random"
            )
    sums: dict[int, _Sums] = {}

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        x_ND, y_NE = activity.x_ND.double(), _log_norms(activity, ffn.experts).double()
        found = [x_ND.new_tensor(len(x_ND)), x_ND.sum(0), y_NE.sum(0), x_ND.T @ x_ND, x_ND.T @ y_NE]
        if id(ffn) in sums:
            found = [new + old for new, old in zip(found, vars(sums[id(ffn)]).values(), strict=True)]
        sums[id(ffn)] = _Sums(*found)

    for run, token_masks_BT in batches:
        with observe(model, see, *token_masks_BT):
            run()
    for ffn in ffns:
        total = _Sums(*(reduce(value) for value in vars(sums[id(ffn)]).values()))
        weight_ED, bias_E = _solve(total)
        own_weight_ED, own_bias_E = ffn.selector.linear()  # type: ignore[misc]
        write(own_weight_ED, weight_ED)
        write(own_bias_E, bias_E)


def _log_norms(activity: Activity, experts: int) -> torch.Tensor:
    """Returns log(norm of each expert's output + floor), less the token's mean over the experts, [N, E]."""
    down_ESD = activity.down_FD.float().unflatten(0, (experts, -1))
    hidden_NES = activity.hidden_NF.float().unflatten(-1, (experts, -1))
    # |h W| by the Gram matrix of W: [E, S, S] instead of outputs [N, E, D]
    products_NES = torch.einsum("nes,est->net", hidden_NES, down_ESD @ down_ESD.mT)
    norm_NE = (products_NES * hidden_NES).sum(-1).clamp_min(0.0).sqrt()
    log_NE = (norm_NE + FLOOR * norm_NE.median().clamp_min(1e-30)).log()
    return log_NE - log_NE.mean(1, keepdim=True)


def _solve(sums: _Sums) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ridge regression's weights [E, D] and biases [E], scaled to `SPREAD`."""
    mean_D, mean_E = sums.x_D / sums.count, sums.y_E / sums.count
    variance_DD = sums.xx_DD / sums.count - torch.outer(mean_D, mean_D)
    covariance_DE = sums.xy_DE / sums.count - torch.outer(mean_D, mean_E)
    ridge = PENALTY * variance_DD.diagonal().mean().clamp_min(1e-12)
    identity_DD = torch.eye(len(mean_D), dtype=variance_DD.dtype, device=variance_DD.device)
    weight_DE = torch.linalg.solve(variance_DD + ridge * identity_DD, covariance_DE)
    # variance over tokens and experts: the mean variance within experts, and the variance of their means
    within = torch.einsum("de,df,fe->e", weight_DE, variance_DD, weight_DE).mean()
    scale = SPREAD / (within + mean_E.var(unbiased=False)).clamp_min(1e-12).sqrt()
    return scale * weight_DE.T, scale * (mean_E - mean_D @ weight_DE)

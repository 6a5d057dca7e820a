"""Experts that a token did not select, on the dense-mask path: what is not finite in their weights stays unseen."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lte_lightning.core.model.parts import Projection, weight_rows
from lte_lightning.kernels import scale_experts

if TYPE_CHECKING:
    from lte_lightning.core.model.experts import ExpertFfn


def without_unselected_experts(
    ffn: "ExpertFfn",
    given_BTD: tuple[torch.Tensor, torch.Tensor],
    factor_BTE: torch.Tensor,
    out_BTD: torch.Tensor,
) -> torch.Tensor:
    """Returns an output of the dense-mask path in which each token owes nothing to experts that it did not select.

    Zeros in a mask do not clear NaN or infinity in the down projection, whose product runs over all experts for all
    tokens. Weights that hold any are rare, and looking for them is dear: so it is the output that is looked at. Only if
    that is not finite, all is computed once more: with 0 for the weights of experts that no token selected, and without
    what is not finite in the down projection, in place of which the tokens that did select it get NaN. A compiled graph
    decides this for itself.

    Selectors that read activations have read those of all experts before this, and choose by what they found there:
    NaN is the largest for ``kla``, and below every level for ``cats`` and ``teal``.

    Args:
        ffn: The FFN.
        given_BTD: What its gate and its up projection were given.
        factor_BTE: True where a token runs an expert, or what its output is scaled by, 0 where it does not run.
        out_BTD: What all experts and the mask gave.
    """
    if out_BTD.is_meta or (out_BTD.is_cuda and torch.cuda.is_current_stream_capturing()):
        return out_BTD  # nothing to look at, or nobody who may
    finite = out_BTD.sum(dtype=torch.float32).isfinite()
    if not torch.compiler.is_compiling():
        return out_BTD if finite else _compute(ffn, given_BTD, factor_BTE)

    def keep() -> torch.Tensor:
        return out_BTD.clone()  # a branch may not return what it was given

    def again() -> torch.Tensor:
        return _compute(ffn, given_BTD, factor_BTE).contiguous()

    return torch.cond(finite, keep, again)


def _compute(ffn: "ExpertFfn", given_BTD: tuple[torch.Tensor, torch.Tensor], factor_BTE: torch.Tensor) -> torch.Tensor:
    runs_BTE = factor_BTE != 0
    runs_F = runs_BTE.flatten(0, -2).any(dim=0).repeat_interleave(ffn.expert_size)

    def project(x_BTD: torch.Tensor, projection: Projection) -> torch.Tensor:
        weight_FD = torch.where(runs_F.unsqueeze(1), weight_rows(projection), 0.0)
        bias_F = None if projection.bias is None else torch.where(runs_F, projection.bias, 0.0)
        return functional.linear(x_BTD, weight_FD, bias_F)

    to_gate_BTD, to_up_BTD = given_BTD
    if ffn.gate is None:
        hidden_BTF = ffn.activation(project(to_up_BTD, ffn.up))
    else:
        hidden_BTF = ffn.activation(project(to_gate_BTD, ffn.gate)) * project(to_up_BTD, ffn.up)
    hidden_BTF = scale_experts(ffn.finished(hidden_BTF), runs_BTE)
    if factor_BTE.dtype != torch.bool:
        hidden_BTF = scale_experts(hidden_BTF, factor_BTE)
    weight_DF = weight_rows(ffn.down)
    finite_DF = weight_DF.isfinite()
    out_BTD = functional.linear(hidden_BTF, torch.where(finite_DF & runs_F, weight_DF, 0.0), ffn.down.bias)
    spoilt_DE = (~finite_DF).unflatten(1, (-1, ffn.expert_size)).any(dim=2)
    spoilt_BTD = functional.linear(runs_BTE.float(), spoilt_DE.float()) > 0
    return out_BTD + torch.where(spoilt_BTD, torch.nan, 0.0).to(out_BTD.dtype)

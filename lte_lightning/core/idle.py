"""Experts that no token selected, on the dense-mask path: what is not finite in their weights stays unseen."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lte_lightning.core.ffn import Projection, weight_rows
from lte_lightning.kernels import scale_experts

if TYPE_CHECKING:
    from lte_lightning.core.expert_ffn import ExpertFfn


def without_idle_experts(
    ffn: "ExpertFfn", x_BTD: torch.Tensor, mask_BTE: torch.Tensor, out_BTD: torch.Tensor
) -> torch.Tensor:
    """Returns an output of the dense-mask path that owes nothing to experts which no token selected.

    Zeros in a mask do not clear NaN or infinity. Weights that hold any are rare, and looking for them is dear: so it is
    the output that is looked at. Only if that is not finite, all is computed once more, with 0 for the weights of these
    experts. A compiled graph decides this for itself.

    Args:
        ffn: The FFN.
        x_BTD: Its input.
        mask_BTE: True where a token runs an expert.
        out_BTD: What all experts and the mask gave.
    """
    if out_BTD.is_meta or (out_BTD.is_cuda and torch.cuda.is_current_stream_capturing()):
        return out_BTD  # nothing to look at, or nobody who may
    finite = out_BTD.sum(dtype=torch.float32).isfinite()
    if not torch.compiler.is_compiling():
        return out_BTD if finite else _compute(ffn, x_BTD, mask_BTE)

    def keep() -> torch.Tensor:
        return out_BTD.clone()  # a branch may not return what it was given

    def again() -> torch.Tensor:
        return _compute(ffn, x_BTD, mask_BTE).contiguous()

    return torch.cond(finite, keep, again)


def _compute(ffn: "ExpertFfn", x_BTD: torch.Tensor, mask_BTE: torch.Tensor) -> torch.Tensor:
    runs_F = mask_BTE.flatten(0, -2).any(dim=0).repeat_interleave(ffn.expert_size)

    def project(projection: Projection) -> torch.Tensor:
        weight_FD = torch.where(runs_F.unsqueeze(1), weight_rows(projection), 0.0)
        bias_F = None if projection.bias is None else torch.where(runs_F, projection.bias, 0.0)
        return functional.linear(x_BTD, weight_FD, bias_F)

    hidden_BTF = ffn.activation(project(ffn.up if ffn.gate is None else ffn.gate))
    if ffn.gate is not None:
        hidden_BTF = hidden_BTF * project(ffn.up)
    weight_DF = torch.where(runs_F, weight_rows(ffn.down), 0.0)
    return functional.linear(scale_experts(ffn.finished(hidden_BTF), mask_BTE), weight_DF, ffn.down.bias)

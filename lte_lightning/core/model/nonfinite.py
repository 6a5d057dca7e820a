"""Keep NaN and inf in the weights of unselected experts out of the output of the dense-mask path."""

from collections.abc import Callable

import torch
from torch.nn import functional

from lte_lightning.core.model.exact import what_surrounds, why_not_linear
from lte_lightning.core.model.parts import Projection, weight_rows
from lte_lightning.kernels import scale_experts


def is_bare(projection: Projection) -> bool:
    """Says whether a projection is its weight and bias alone: no adapter, hook, shard or quantised weight."""
    return not (why_not_linear(projection) or what_surrounds(projection))


def guard(out_BTD: torch.Tensor, again: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Returns an output in which no token depends on an expert that it did not select.

    Zeros in a mask do not clear NaN or infinity in the down projection, whose product runs over all experts for all
    tokens. Such weights are rare, and a check of all weights is expensive, so this checks the output. Only if the
    output is nonfinite, `again` computes it without those weights. A compiled graph decides this for itself.

    Selectors that read activations have already read those of all experts. NaN is the largest activation for ``kla``,
    and below every level for ``cats`` and ``teal``.

    Args:
        out_BTD: The output of all experts and the mask.
        again: Computes the output once more, by `down_selected`.
    """
    if out_BTD.is_meta or (out_BTD.is_cuda and torch.cuda.is_current_stream_capturing()):
        return out_BTD  # meta tensors have no values; a graph capture must not synchronise
    finite = out_BTD.sum(dtype=torch.float32).isfinite()
    if not torch.compiler.is_compiling():
        return out_BTD if finite else again()

    def keep() -> torch.Tensor:
        return out_BTD.clone()  # a branch may not return its input

    return torch.cond(finite, keep, lambda: again().contiguous())


def project_running(projection: Projection, x_BTD: torch.Tensor, runs_F: torch.Tensor) -> torch.Tensor:
    """Projects with 0 for the weights of neurons that no token runs, so that NaN in them reaches no gradient.

    Args:
        projection: Up or gate. A projection that is not bare runs unchanged.
        x_BTD: Its input.
        runs_F: True for the neurons that some token runs.
    """
    if not is_bare(projection):
        return projection(x_BTD)
    weight_FD = torch.where(runs_F.unsqueeze(1), weight_rows(projection), 0.0)
    bias_F = None if projection.bias is None else torch.where(runs_F, projection.bias, 0.0)
    return functional.linear(x_BTD, weight_FD, bias_F)


def down_selected(down: Projection, hidden_BTF: torch.Tensor, factor_BTE: torch.Tensor) -> torch.Tensor:
    """Applies the down projection to each token's selected experts.

    It leaves nonfinite weights out, and the tokens that selected them get NaN instead. A projection that is not bare
    (an adapter, a hook) runs unchanged, so that its nonfinite values reach every token.

    Args:
        down: The down projection.
        hidden_BTF: Hidden activations of all experts, not yet masked.
        factor_BTE: True where a token runs an expert; or the scale of an expert's output, 0 where it does not run.
    """
    runs_BTE = factor_BTE != 0
    hidden_BTF = scale_experts(hidden_BTF, runs_BTE)
    if factor_BTE.dtype != torch.bool:
        hidden_BTF = scale_experts(hidden_BTF, factor_BTE)
    if not is_bare(down):
        return down(hidden_BTF)
    expert_size = hidden_BTF.shape[-1] // factor_BTE.shape[-1]
    runs_F = running_neurons(runs_BTE, expert_size)
    weight_DF = weight_rows(down)
    finite_DF = weight_DF.isfinite()
    out_BTD = functional.linear(hidden_BTF, torch.where(finite_DF & runs_F, weight_DF, 0.0), down.bias)
    spoilt_DE = (~finite_DF).unflatten(1, (-1, expert_size)).any(dim=2)
    spoilt_BTD = functional.linear(runs_BTE.float(), spoilt_DE.float()) > 0
    return out_BTD + torch.where(spoilt_BTD, torch.nan, 0.0).to(out_BTD.dtype)


def running_neurons(runs_BTE: torch.Tensor, expert_size: int) -> torch.Tensor:
    """Returns True for the neurons of experts that some token runs, [F]."""
    return runs_BTE.flatten(0, -2).any(dim=0).repeat_interleave(expert_size)

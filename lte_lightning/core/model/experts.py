"""An FFN whose neurons are grouped into experts."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from lte_lightning.core.model.nonfinite import without_unselected_experts
from lte_lightning.core.model.parts import FfnParts, Projection, weight_rows
from lte_lightning.core.model.storage import route, run_sparse
from lte_lightning.kernels import scale_experts
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.selection import Selector

Mode = Literal["dense", "soft", "hard"]
MODES: tuple[Mode, ...] = ("dense", "soft", "hard")


class ExpertFfn(nn.Module):
    """One FFN, run densely, softly (equation 3 of the paper) or with selected experts only (equation 2).

    It owns the original projections, whose neurons `permute` puts in the order of their experts: expert i is the
    neurons ``i * S`` to ``(i + 1) * S``. The output bias, where there is one, is always added.

    Args:
        parts: The original modules.
        expert_size: S.
        selector: Maps the input [B, T, D] to scores [B, T, E].
        threshold: tau; in hard mode the experts whose score exceeds it run, unscaled (unless the selector ``scales``).

    With ``straight_through`` hard mode has the gradient of soft mode's factors for the scores, so that routers learn.
    """

    up: Projection
    gate: Projection | None
    down: Projection
    selector: Selector

    def __init__(self, parts: FfnParts, expert_size: int, selector: Selector, threshold: float) -> None:
        super().__init__()
        self.up, self.gate, self.down = parts.up, parts.gate, parts.down
        self.activation, self.dropout, self.row = parts.activation, parts.dropout, parts.row
        self.selector = selector
        self.expert_size = expert_size
        self.threshold = threshold
        self.mode: Mode = "dense"
        self.backend: Backend = "dense-mask"
        self.straight_through = False
        self.recorder: Callable[[ExpertFfn, torch.Tensor, torch.Tensor], None] | None = None
        self.observer: Callable[[ExpertFfn, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.shell: tuple[nn.Module, ...] = ()
        self.stack = 0  # 1 in the decoder of a model that has an encoder too

    @property
    def width(self) -> int:
        """D, the width of input and output."""
        return weight_rows(self.up).shape[1]

    @property
    def neurons(self) -> int:
        """F, the number of neurons."""
        return weight_rows(self.up).shape[0]

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return self.neurons // self.expert_size

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the FFN's output, [B, T, D]; in soft and hard mode the scores go to the recorder, if there is one."""
        if self.mode == "dense":
            gate_BTF, hidden_BTF = self._activations(x_BTD, x_BTD)
            if self.observer is not None:
                self.observer(self, x_BTD, gate_BTF, hidden_BTF)
            return self.down(self.finished(hidden_BTF))
        given_BTD = (x_BTD, x_BTD)
        # scores that nobody asks for are not made where the device can go straight to the mask
        skips = self.mode == "hard" and self.backend != "dense-mask"
        factor_BTE = route(self, self.selector, x_BTD) if skips and self.recorder is None else None
        if factor_BTE is None:
            if self.selector.reads != "input":  # the selection needs what it is to save
                given_BTD = self.selector.thin(x_BTD) if self.mode == "hard" else given_BTD
                gate_BTF, hidden_BTF = self._activations(*given_BTD)
                scores_BTE = self.selector(gate_BTF if self.selector.reads == "gate" else hidden_BTF)
            else:
                scores_BTE = self.selector(x_BTD)
            if self.recorder is not None:
                self.recorder(self, scores_BTE, x_BTD)
            factor_BTE = self._factor(scores_BTE)
        if self.selector.reads == "input":
            if skips:
                out_BTD = run_sparse(self, x_BTD, factor_BTE)
                if out_BTD is not None:
                    return out_BTD
            _, hidden_BTF = self._activations(*given_BTD)
        out_BTD = self.down(scale_experts(self.finished(hidden_BTF), factor_BTE))
        # where weights are trained they are finite, and the host waits for no device
        if self.mode == "hard" and not (self.training and torch.is_grad_enabled()):
            return without_unselected_experts(self, given_BTD, factor_BTE, out_BTD)
        return out_BTD

    def _factor(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        if self.mode == "soft" or self.selector.scales:
            return scores_BTE
        mask_BTE = scores_BTE > self.threshold
        if self.straight_through and scores_BTE.requires_grad:  # else a mask, as the sparse backends want it
            return mask_BTE + (scores_BTE - scores_BTE.detach())
        return mask_BTE

    def _activations(self, to_gate_BTD: torch.Tensor, to_up_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the activated gate (of a plain FFN: the hidden activations) and the hidden activations, [B, T, F]."""
        if self.gate is None:
            hidden_BTF = self.activation(self.up(to_up_BTD))
            return hidden_BTF, hidden_BTF
        gate_BTF = self.activation(self.gate(to_gate_BTD))
        return gate_BTF, gate_BTF * self.up(to_up_BTD)

    def finished(self, hidden_BTF: torch.Tensor) -> torch.Tensor:
        """Returns the hidden activations as the down projection takes them: after dropout, and in its type."""
        if self.dropout is not None:
            hidden_BTF = self.dropout(hidden_BTF)
        if hidden_BTF.dtype != self.down.weight.dtype and not torch.is_autocast_enabled(hidden_BTF.device.type):
            return hidden_BTF.to(self.down.weight.dtype)  # T5 keeps its down projections in float32
        return hidden_BTF

    @torch.no_grad()
    def permute(self, permutation_F: torch.Tensor) -> None:
        """Reorders the neurons in place, without changing the function."""
        for projection in (self.up, self.gate):
            if projection is None:
                continue
            rows_FD = weight_rows(projection)
            rows_FD.copy_(rows_FD[permutation_F])
            if projection.bias is not None:
                projection.bias.copy_(projection.bias[permutation_F])
        columns_DF = weight_rows(self.down)
        columns_DF.copy_(columns_DF[:, permutation_F])

    def extra_repr(self) -> str:
        """Describes the experts in ``print(model)``."""
        return f"{self.experts} experts x {self.expert_size} neurons, mode={self.mode}, threshold={self.threshold}"

    def flops(self, sparsity: float) -> int:
        """FLOPs per token at a sparsity, with what the selection costs: two per multiply-add."""
        return round(self.flops_dense() * self.computed(sparsity)) + self.selector.flops_per_token()

    def computed(self, sparsity: float) -> float:
        """The share of the weights that is used at a sparsity; some selectors need a projection whole."""
        whole = self.selector.whole_projections() / (2 if self.gate is None else 3)
        return whole + (1.0 - whole) * (1.0 - sparsity)

    def flops_dense(self) -> int:
        """Multiply-adds of the whole FFN per token, times two."""
        return 2 * sum(p.weight.numel() for p in (self.up, self.gate, self.down) if p is not None)

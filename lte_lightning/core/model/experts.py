"""An FFN whose neurons are grouped into experts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lte_lightning.core.model.exact import computes_on
from lte_lightning.core.model.nonfinite import down_selected, guard, is_bare, project_running, running_neurons
from lte_lightning.core.model.parts import FfnParts, Projection, weight_rows
from lte_lightning.core.model.prepared import (
    DENSE_MASK,
    Prepared,
    marks_of,
    prepare,
    prepare_skipping,
    report,
    route,
)
from lte_lightning.core.model.sharding import whole, write
from lte_lightning.errors import UserError
from lte_lightning.kernels import hidden_activations, scale_experts
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.selection import Selector

Mode = Literal["dense", "soft", "hard"]
MODES: tuple[Mode, ...] = ("dense", "soft", "hard")
Project = Callable[[Projection, torch.Tensor], torch.Tensor]
_MODULES = ("up", "gate", "down", "selector", "dropout")  # the activation may be a function


def _call(projection: Projection, x_BTD: torch.Tensor) -> torch.Tensor:
    return projection(x_BTD)


class ExpertFfn(nn.Module):
    """One FFN, run densely, softly (equation 3 of the paper) or with selected experts only (equation 2).

    It owns the original projections. `permute` puts their neurons in the order of the experts: expert i has the neurons
    ``i * S`` to ``(i + 1) * S``. An output bias is always added.

    Args:
        parts: The original modules.
        expert_size: S.
        selector: Maps the input [B, T, D] to scores [B, T, E].
        threshold: tau. In hard mode the experts whose score exceeds it run, unscaled (unless the selector ``scales``).

    With ``straight_through``, hard mode gives the scores the gradient of soft mode's factors, so that routers learn.
    With ``detach_router``, that gradient ends at the selector's own weights. With ``skips_in_training``, hard mode
    computes only selected experts in training, too, if that is expected to be faster.
    """

    up: Projection
    gate: Projection | None
    down: Projection
    selector: Selector
    tau: torch.Tensor
    guards = True  # whether the dense-mask path looks for NaN, see `guard`

    def __init__(self, parts: FfnParts, expert_size: int, selector: Selector, threshold: float) -> None:
        super().__init__()
        self.up, self.gate, self.down = parts.up, parts.gate, parts.down
        self.activation, self.dropout, self.row = parts.activation, parts.dropout, parts.row
        self.neurons, self.width = weight_rows(parts.up).shape  # F and D
        self.selector, self.expert_size = selector, expert_size
        self.register_buffer("tau", torch.tensor(threshold, device=computes_on(parts.up)).float(), persistent=False)
        self._threshold = self.trained_threshold = threshold
        self.mode: Mode = "dense"
        self.backend: Backend = "dense-mask"
        self.straight_through = self.skips_in_training = self.detach_router = False
        self.recorder: Callable[[ExpertFfn, torch.Tensor, torch.Tensor], None] | None = None
        self.observer: Callable[[ExpertFfn, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.shell: tuple[nn.Module, ...] = ()
        self.stack = 0  # 1 in the decoder of a model that has an encoder too
        self._prepared: Prepared | None = None

    @property
    def parts(self) -> FfnParts:
        """The current modules. An adapter or a quantiser may have replaced the original modules."""
        return FfnParts(self.up, self.gate, self.down, self.activation, self.dropout, self.row)

    @property
    def threshold(self) -> float:
        """The threshold of scores. Setting it writes in place, so that compiled and captured code follows."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = threshold
        if not self.tau.is_meta:
            self.tau.fill_(threshold)

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return self.neurons // self.expert_size

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the FFN's output, [B, T, D]. In soft and hard mode a recorder, if there is one, gets the scores."""
        if self.mode == "dense":
            return self._dense(x_BTD)
        prepared = self.prepare(x_BTD)
        thins = self.mode == "hard" and self.selector.reads != "input"
        given_BTD = self.selector.sparsify_input(x_BTD) if thins else (x_BTD, x_BTD)
        factor_BTE, hidden_BTF = self._select(x_BTD, given_BTD, prepared.routes)
        if prepared.takes(factor_BTE):
            return prepared.run(x_BTD, factor_BTE)
        if hidden_BTF is None:
            _, hidden_BTF = self._activations(*given_BTD)
        hidden_BTF = self.finished(hidden_BTF)
        if hidden_BTF.shape[-1] != self.neurons:
            raise UserError(
                f"the up projection gave {hidden_BTF.shape[-1]} of {self.neurons} neurons, and experts are selected "
                "among all of them. Tensor parallelism of FFNs is not supported: shard with FSDP, or leave them whole"
            )
        out_BTD = self.down(scale_experts(hidden_BTF, factor_BTE))
        # Weights in training are finite, and without the guard the host does not wait for the device.
        if self.mode == "hard" and self.guards and not (self.training and torch.is_grad_enabled()):
            return self._guard(out_BTD, given_BTD, hidden_BTF, factor_BTE)
        return out_BTD

    def _dense(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF, hidden_BTF = self._activations(x_BTD, x_BTD)
        if self.observer is not None:
            self.observer(self, x_BTD, gate_BTF, hidden_BTF)
        return self.down(self.finished(hidden_BTF))

    def prepare(self, x_BTD: torch.Tensor) -> Prepared:
        """Returns the prepared backend for such an input. It is chosen once, and again if its conditions change."""
        skipping = self.skips_in_training and not torch.compiler.is_compiling()
        if self.mode != "hard" or (self.backend == "dense-mask" and not skipping):
            return DENSE_MASK
        gradient = torch.is_grad_enabled() and (x_BTD.requires_grad or any(p.requires_grad for p in self.parameters()))
        if skipping and (gradient or self.backend == "dense-mask"):
            return prepare_skipping(self.parts, self.selector, self.expert_size, x_BTD)
        if gradient or torch.compiler.is_compiling():
            prepared = prepare(self.parts, self.selector, self.expert_size, self.backend, x_BTD, gradient)
        else:
            modules = map(self._modules.get, _MODULES)
            marks = marks_of(x_BTD, self.backend, self.expert_size, self.activation, *modules)
            if self._prepared is None or self._prepared.marks != marks:
                self._prepared = prepare(
                    self.parts, self.selector, self.expert_size, self.backend, x_BTD, gradient, marks
                )
            prepared = self._prepared
        if prepared.choice.fallback and not self.training:
            report(prepared, self.backend)
        return prepared

    def _select(
        self, x_BTD: torch.Tensor, given_BTD: tuple[torch.Tensor, torch.Tensor], routes: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the factor of each expert, [B, T, E], and the hidden activations if the selector needs them."""
        if routes and self.recorder is None:
            return route(self.selector, self.tau, x_BTD), None
        hidden_BTF = None
        if self.selector.reads == "input":
            scores_BTE = self.selector(x_BTD.detach() if self.detach_router else x_BTD)
        else:
            gate_BTF, hidden_BTF = self._activations(*given_BTD)
            scores_BTE = self.selector(gate_BTF if self.selector.reads == "gate" else hidden_BTF)
        if self.recorder is not None:
            self.recorder(self, scores_BTE, x_BTD)
        return self._factor(scores_BTE), hidden_BTF

    def _factor(self, scores_BTE: torch.Tensor) -> torch.Tensor:
        if self.mode == "soft" or self.selector.scales:
            return scores_BTE
        mask_BTE = scores_BTE > self.tau
        if self.straight_through and scores_BTE.requires_grad:  # else a mask, which the sparse backends need
            return mask_BTE + (scores_BTE - scores_BTE.detach())
        return mask_BTE

    def _activations(
        self, to_gate_BTD: torch.Tensor, to_up_BTD: torch.Tensor, project: Project = _call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the activated gate (of a plain FFN: the hidden activations) and the hidden activations, [B, T, F]."""
        gate_BTF = None if self.gate is None else project(self.gate, to_gate_BTD)
        return hidden_activations(self.activation, project(self.up, to_up_BTD), gate_BTF)

    def finished(self, hidden_BTF: torch.Tensor) -> torch.Tensor:
        """Returns the hidden activations for the down projection: after dropout, and in its type."""
        if self.dropout is not None:
            hidden_BTF = self.dropout(hidden_BTF)
        weight: object = getattr(self.down, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():  # it is quantised
            return hidden_BTF
        if hidden_BTF.dtype != weight.dtype and not torch.is_autocast_enabled(hidden_BTF.device.type):
            return hidden_BTF.to(weight.dtype)  # T5 keeps its down projections in float32
        return hidden_BTF

    def _guard(
        self,
        out_BTD: torch.Tensor,
        given_BTD: tuple[torch.Tensor, torch.Tensor],
        hidden_BTF: torch.Tensor,
        factor_BTE: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the output without NaN and infinity from experts that a token did not select (see `guard`)."""
        compiling = torch.compiler.is_compiling()
        if compiling and not all(p is None or is_bare(p) for p in (self.up, self.gate, self.down)):
            return out_BTD  # a branch of a graph may not call modules that have hooks
        # NaN reaches gradients through up and gate. A branch of a graph may not read both halves of a fused projection.
        zeroes = torch.is_grad_enabled() and not (compiling and self.row.fused)

        def again() -> torch.Tensor:
            hidden = hidden_BTF
            if zeroes:
                runs_F = running_neurons(factor_BTE != 0, self.expert_size)
                _, hidden = self._activations(*given_BTD, lambda projection, x: project_running(projection, x, runs_F))
                hidden = self.finished(hidden)
            return down_selected(self.down, hidden, factor_BTE)

        return guard(out_BTD, again)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExpertFfn":
        self._prepared = None  # its views would keep the memory that the weights leave
        super()._apply(fn, recurse)
        self.tau = self.tau.float()  # it must be neither rounded nor emptied by to_empty
        self.threshold = self._threshold
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    @torch.no_grad()
    def permute(self, permutation_F: torch.Tensor) -> None:
        """Reorders the neurons in place, without changing the function."""
        for projection in (self.up, self.gate):
            if projection is None:
                continue
            rows_FD = weight_rows(projection)
            write(rows_FD, whole(rows_FD)[permutation_F])
            if projection.bias is not None:
                write(projection.bias, whole(projection.bias)[permutation_F])
        columns_DF = weight_rows(self.down)
        write(columns_DF, whole(columns_DF)[:, permutation_F])

    def extra_repr(self) -> str:
        """Describes the experts in ``print(model)``."""
        return f"{self.experts} experts x {self.expert_size} neurons, mode={self.mode}, threshold={self.threshold}"

    def flops(self, sparsity: float) -> int:
        """Returns the FLOPs per token at a sparsity, selection included: two per multiply-add."""
        return round(self.flops_dense() * self.computed(sparsity)) + self.selector.flops_per_token()

    def computed(self, sparsity: float) -> float:
        """Returns the share of the weights that is used at a sparsity. Some selectors need a whole projection."""
        whole = self.selector.whole_projections() / (2 if self.gate is None else 3)
        return whole + (1.0 - whole) * (1.0 - sparsity)

    def flops_dense(self) -> int:
        """Returns the FLOPs per token of the dense FFN: two per multiply-add."""
        return 2 * self.neurons * self.width * (2 if self.gate is None else 3)


def expert_ffns(model: nn.Module) -> dict[str, ExpertFfn]:
    """Returns the expert FFNs of a model by name, in order. There are none if the model was not converted."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertFfn)}


def require_expert_ffns(model: nn.Module) -> dict[str, ExpertFfn]:
    """Returns the expert FFNs.

    Raises:
        UserError: If there are none.
    """
    ffns = expert_ffns(model)
    if not ffns:
        raise UserError(f"this {type(model).__name__} has no expert FFNs; convert() it first")
    return ffns


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switches every expert FFN of ``model`` to ``dense``, ``soft`` or ``hard``."""
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    for ffn in require_expert_ffns(model).values():
        ffn.mode = mode

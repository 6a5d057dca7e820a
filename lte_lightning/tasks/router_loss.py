"""The routers' losses beside the task: the terms of equation 6, or a balance loss, and their weights."""

import torch

from lte_lightning.core.routing.observe import balances
from lte_lightning.core.routing.target_sparsity import controlled
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.tasks.steps import StepLosses


class RouterLosses(StepLosses):
    """A module with the routers' losses; `LteModule` has their options."""

    @property
    def efficiency_weight(self) -> float:
        """eta: the option's value, else 0.5, or 0 where a target sparsity is held."""
        weight = self.hparams["efficiency_weight"]
        return (0.0 if controlled(self.net) else 0.5) if weight is None else weight

    def separability_weight_now(self) -> float:
        """Returns lambda at this point of the router stage; in the expert stage it has its full weight."""
        if self.stage == "expert":
            return self.hparams["separability_weight"]
        start, end = self.hparams["separability_start"], self.hparams["separability_end"]
        if self.stage_progress >= end:
            return self.hparams["separability_weight"]
        if self.stage_progress <= start:
            return 0.0
        return self.hparams["separability_weight"] * (self.stage_progress - start) / (end - start)

    def _router_loss(self, trace: RouterTrace, weights: torch.Tensor | None) -> torch.Tensor:
        if balances(self.net):
            return self.hparams["balance_weight"] * self.note("balance_loss", trace.balance_loss(weights))
        efficiency = self.note("efficiency_loss", trace.efficiency_loss(weights))
        separability = trace.separability_loss(self.hparams["separability_epsilon"], weights)
        self.note("separability_loss", separability)
        weight = self.separability_weight_now()
        self.log("train/separability_weight", weight)
        return self.efficiency_weight * efficiency + weight * separability

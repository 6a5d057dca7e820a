"""A target sparsity in training: when the routers' biases are moved, and by how much."""

import torch
from lightning.pytorch import LightningModule

from lte_lightning.core.routing.control import controlled, distances, follow, wanted_sparsity
from lte_lightning.core.routing.trace import RouterTrace

RATES = {"router": 0.7, "expert": 0.05}
"""Share of the distance that a step makes up for: routers that learn are followed quickly, frozen ones slowly."""


class SparsityControl:
    """Gathers what a step's batches tell, and moves the biases once the optimizer has.

    What it moves are the model's own weights, and the rest follows from the stage's progress: a resumed fit needs no
    state of it.
    """

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def applies(self, module: LightningModule) -> bool:
        """Says whether the current stage has routers to be held."""
        return module.stage in RATES and controlled(module.net)

    def see(self, module: LightningModule, trace: RouterTrace) -> None:
        """Takes in what the routers decided on a batch."""
        progress = module.stage_progress if module.stage == "router" else 1.0
        wanted = wanted_sparsity(module.net.lte_config.target_sparsity, progress)
        self._seen.append(distances(module.net, trace, wanted))
        module.log("train/sparsity", trace.sparsity())

    def step(self, module: LightningModule) -> None:
        """Moves the biases by the mean over the step's batches and all devices."""
        if self._seen:
            mean_L = module.trainer.strategy.reduce(torch.stack(self._seen).mean(0), reduce_op="mean")
            follow(module.net, mean_L, RATES[module.stage])
            self._seen = []

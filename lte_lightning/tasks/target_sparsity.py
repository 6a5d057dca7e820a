"""A target sparsity in training, or a range: when the routers' biases are shifted, and by how much."""

from typing import Any

import torch

from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.target_sparsity import (
    clamped_gaps,
    controlled,
    histogram,
    quantiles,
    shift_logits,
    wanted_sparsity,
)
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError
from lte_lightning.tasks.evaluation import MeasuredModule, Stage
from lte_lightning.tasks.selector_training import shift_to_target

RATES: dict[Stage, float] = {"router": 0.7, "expert": 0.05}
"""Share of the distance to the target that a step corrects: large while routers learn, small once they are frozen."""
GRID = tuple(k / 20 for k in range(1, 20))
"""Sparsities whose thresholds are kept while a range is trained."""
MEMORY = 0.3
"""Weight of the newest step in the moving average of the thresholds."""


class SparsityControl:
    """Counts the routers' scores of an optimizer step's batches, and shifts the routers' biases after the step.

    The biases are the model's own weights, so checkpoints need no more for the target. With a range, each step draws a
    sparsity, and uses the threshold that gave this sparsity in recent steps. Checkpoints keep those thresholds.

    Args:
        sparsities: The range, or None for the target alone.

    Raises:
        UserError: If the range is invalid.
    """

    def __init__(self, sparsities: tuple[float, float] | None = None) -> None:
        if sparsities is not None and not GRID[0] <= sparsities[0] < sparsities[1] <= GRID[-1]:
            raise UserError(
                f"sparsity_range is {list(sparsities)}; it must be [low, high] with {GRID[0]} <= low < high <= "
                f"{GRID[-1]}, for example [0.3, 0.9]"
            )
        self.range = sparsities
        self._seen: torch.Tensor | None = None
        self._logits_LK: torch.Tensor | None = None

    def applies(self, module: MeasuredModule) -> bool:
        """Says whether the current stage has routers to be held."""
        return module.stage in RATES and controlled(module.net)

    def draw_sparsity(self, module: MeasuredModule) -> None:
        """Sets the thresholds of the sparsity that an optimizer step draws, the same on every device."""
        if self.range is None or self._logits_LK is None or module.stage_mode != "hard" or not self.applies(module):
            return
        generator = torch.Generator().manual_seed(module.hparams["seed"] * 1_000_003 + module.global_step)
        low, high = self.range
        sparsity = low + (high - low) * float(torch.rand((), generator=generator))
        # The threshold lies between those of the two grid points around the sparsity
        place = (sparsity - GRID[0]) / (GRID[1] - GRID[0])
        below = min(int(place), len(GRID) - 2)
        logits_L = self._logits_LK[:, below].lerp(self._logits_LK[:, below + 1], place - below)
        for ffn, threshold in zip(expert_ffns(module.net).values(), logits_L.sigmoid().tolist(), strict=True):
            ffn.threshold = threshold

    def add_batch(self, module: MeasuredModule, trace: RouterTrace) -> None:
        """Takes in what the routers decided on a batch."""
        counts_LH = histogram(module.net, trace)
        self._seen = counts_LH if self._seen is None else self._seen + counts_LH
        module.log("train/sparsity", trace.sparsity())

    def shift_biases(self, module: MeasuredModule) -> None:
        """Moves the biases by what a step's batches say on all devices."""
        if self._seen is None:
            return
        counts_LH = module.trainer.strategy.reduce(self._seen, reduce_op="sum")
        self._seen = None
        progress = module.stage_progress if module.stage == "router" else 1.0
        wanted = wanted_sparsity(lte_config(module.net).target_sparsity or 0.0, progress)
        moved_L = RATES[module.stage] * clamped_gaps(module.net, counts_LH, wanted)
        shift_logits(module.net, moved_L, 1.0)
        if self.range is not None:
            for ffn in expert_ffns(module.net).values():
                ffn.threshold = ffn.trained_threshold
            now_LK = torch.stack([quantiles(module.net, counts_LH, share) for share in GRID], 1).float()
            # The logits have moved since they were counted, and so have their quantiles
            before_LK = now_LK.cpu() if self._logits_LK is None else self._logits_LK
            self._logits_LK = before_LK.lerp(now_LK.cpu(), MEMORY) + moved_L.float().cpu().unsqueeze(1)

    def reach_target(self, module: MeasuredModule) -> None:
        """Moves the biases until training rows have the target, after an epoch of frozen routers."""
        epoch_ends = module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if module.stage == "expert" and self.applies(module) and epoch_ends and not module.trainer.sanity_checking:
            moved_L = shift_to_target(module)
            if self._logits_LK is not None:
                self._logits_LK = self._logits_LK + moved_L.unsqueeze(1)

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep."""
        return {} if self._logits_LK is None else {"threshold_logits": self._logits_LK}

    def resume(self, saved: dict[str, Any]) -> None:
        """Restores what `saved` returned."""
        self._logits_LK = saved.get("threshold_logits")

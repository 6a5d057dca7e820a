"""Callbacks: stages, checkpoints, progress."""

from typing import TYPE_CHECKING

from lte_lightning.lazy import on_first_use

if TYPE_CHECKING:
    from lte_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
    from lte_lightning.callbacks.plan import StagePlan
    from lte_lightning.callbacks.progress import EpochLines, StageProgressBar
    from lte_lightning.callbacks.stages import StageSchedule
    from lte_lightning.callbacks.strategy import ShardedStrategy
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "checkpoints": ["BestCheckpoint", "LastCheckpoint"],
            "plan": ["StagePlan"],
            "progress": ["EpochLines", "StageProgressBar"],
            "stages": ["StageSchedule"],
            "strategy": ["ShardedStrategy"],
        },
    )

__all__ = [
    "BestCheckpoint",
    "EpochLines",
    "LastCheckpoint",
    "ShardedStrategy",
    "StagePlan",
    "StageProgressBar",
    "StageSchedule",
]

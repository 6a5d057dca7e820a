"""Callbacks: when stages change, and what is kept."""

from lte_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lte_lightning.callbacks.plan import StagePlan
from lte_lightning.callbacks.progress import EpochLines, StageProgressBar
from lte_lightning.callbacks.stages import StageSchedule

__all__ = [
    "BestCheckpoint",
    "EpochLines",
    "LastCheckpoint",
    "StagePlan",
    "StageProgressBar",
    "StageSchedule",
]

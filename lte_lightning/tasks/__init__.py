"""One LightningModule per task."""

from lte_lightning.tasks.classification import Classification

__all__ = ["Classification"]

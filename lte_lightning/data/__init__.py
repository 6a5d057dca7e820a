"""Data of the experiments as Lightning data modules."""

from lte_lightning.data.glue import GLUE_TASKS, GlueData
from lte_lightning.data.packaged import DataError
from lte_lightning.data.reviews import MovieReviews

__all__ = ["GLUE_TASKS", "DataError", "GlueData", "MovieReviews"]

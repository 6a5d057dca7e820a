"""Data of the experiments as Lightning data modules."""

from typing import TYPE_CHECKING

from lte_lightning.lazy import on_first_use

if TYPE_CHECKING:
    from lte_lightning.data.classification import ClassificationData
    from lte_lightning.data.generation import GenerationData
    from lte_lightning.data.glue import GLUE_TASKS, GlueData
    from lte_lightning.data.instruct import InstructData
    from lte_lightning.data.language_model import LanguageModelData
    from lte_lightning.data.mmlu import MmluData
    from lte_lightning.data.packaged import DataError
    from lte_lightning.data.reviews import MovieReviews
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "classification": ["ClassificationData"],
            "generation": ["GenerationData"],
            "glue": ["GLUE_TASKS", "GlueData"],
            "instruct": ["InstructData"],
            "language_model": ["LanguageModelData"],
            "mmlu": ["MmluData"],
            "packaged": ["DataError"],
            "reviews": ["MovieReviews"],
        },
    )

__all__ = [
    "GLUE_TASKS",
    "ClassificationData",
    "DataError",
    "GenerationData",
    "GlueData",
    "InstructData",
    "LanguageModelData",
    "MmluData",
    "MovieReviews",
]

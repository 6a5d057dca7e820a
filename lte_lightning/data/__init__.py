"""Data of the experiments as Lightning data modules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lte_lightning.data.generation import GenerationData
    from lte_lightning.data.glue import GLUE_TASKS, GlueData
    from lte_lightning.data.instruct import InstructData
    from lte_lightning.data.language_model import LanguageModelData
    from lte_lightning.data.mmlu import MmluData
    from lte_lightning.data.packaged import DataError
    from lte_lightning.data.reviews import MovieReviews

__all__ = [
    "GLUE_TASKS",
    "DataError",
    "GenerationData",
    "GlueData",
    "InstructData",
    "LanguageModelData",
    "MmluData",
    "MovieReviews",
]

_MODULE_OF = {
    "DataError": "packaged",
    "GLUE_TASKS": "glue",
    "GenerationData": "generation",
    "GlueData": "glue",
    "InstructData": "instruct",
    "LanguageModelData": "language_model",
    "MmluData": "mmlu",
    "MovieReviews": "reviews",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that whoever only wants `data.packaged` does not load lightning and datasets.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)

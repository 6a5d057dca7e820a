"""One LightningModule per task."""

from typing import TYPE_CHECKING

from lte_lightning.lazy import on_first_use

if TYPE_CHECKING:
    from lte_lightning.tasks.classification import Classification
    from lte_lightning.tasks.generation import Generation
    from lte_lightning.tasks.language_model import LanguageModel
    from lte_lightning.tasks.mmlu import Mmlu
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "classification": ["Classification"],
            "generation": ["Generation"],
            "language_model": ["LanguageModel"],
            "mmlu": ["Mmlu"],
        },
    )

__all__ = ["Classification", "Generation", "LanguageModel", "Mmlu"]

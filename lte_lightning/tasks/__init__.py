"""One LightningModule per task."""

from lte_lightning.tasks.classification import Classification
from lte_lightning.tasks.generation import Generation
from lte_lightning.tasks.language_model import LanguageModel
from lte_lightning.tasks.mmlu import Mmlu

__all__ = ["Classification", "Generation", "LanguageModel", "Mmlu"]

"""Write the dense function as an ordinary Hugging Face folder, without any file of this package."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from lte_lightning.core.model.card import README, dense_card
from lte_lightning.core.model.folder import find
from lte_lightning.export.staging import staged


def write_dense(model: PreTrainedModel, description: dict[str, Any], source: str, folder: Path) -> None:
    """Writes a plain model with its tokenizer and a card, whole or not at all.

    Args:
        model: A plain model; `restore` makes one of a converted model.
        description: The contents of the converted model's ``lte_config.json``.
        source: The folder or hub id of its tokenizer.
        folder: The folder to write.
    """
    with staged(folder) as staging:
        model.save_pretrained(staging)
        if any(find(source, name) for name in ("tokenizer.json", "tokenizer_config.json")):
            AutoTokenizer.from_pretrained(source).save_pretrained(staging)
        dense_card(description, model.config).save(staging / README)

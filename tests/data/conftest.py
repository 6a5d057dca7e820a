import os

# Read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import BertTokenizerFast

WORDS = "the a film plot is was very not good bad dull bright cat dog sat ran and"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch) -> Path:
    """No test reads or fills the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path / "datasets-cache"


@pytest.fixture
def tokenizer_folder(tmp_path) -> str:
    """A saved word-level BERT tokenizer with a limit of 64 tokens."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    folder = str(tmp_path / "tokenizer")
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_splits(tmp_path) -> Callable[..., str]:
    """Write one jsonl file per split, and return their folder."""

    def write(**splits: list[dict[str, Any]]) -> str:
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        for name, rows in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write

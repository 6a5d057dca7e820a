"""From text to padded batches: tokenising once, batching by length."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from lte_lightning.data.packaged import DataError, resolve
from lte_lightning.errors import meant_path

# Loader of tokenised rows; the data module's collate function makes the batches
Loader = DataLoader[Any]

_MEGA_BATCH = 50


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, so that little is padded.

    Shuffled (training): the rows are permuted, cut into stretches of 50 batches, sorted by length within each, cut into
    batches, and the batches are shuffled. Not shuffled (evaluation): all rows by length, longest first.

    Args:
        lengths: Length of every row.
        batch_size: Rows per batch and process.
        shuffle: Whether these are training batches.
        seed: With the epoch, decides the shuffling.
        num_replicas: Number of processes that share the rows. Training batches wrap around, so that each process gets
            equally many. Evaluation rows are dealt out without repetition, at least one to each process.
        rank: The number of this process.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        # A process without a batch would leave the others waiting in the first collective of DDP's forward.
        if len(lengths) < num_replicas:
            raise DataError(f"{len(lengths)} rows are too few for {num_replicas} processes: use fewer devices")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.first = 0

    @property
    def sampler(self) -> "BucketBatchSampler":
        """Itself: Lightning looks for `set_epoch` at `dataloader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of the next iteration."""
        self.begin(epoch, 0)

    def begin(self, epoch: int, batch: int) -> None:
        """Choose the shuffling and the first batch of this process's next iteration."""
        self.epoch = epoch
        self.first = batch

    def __len__(self) -> int:
        if self.shuffle:
            batches = -(-len(self.lengths) // self.batch_size)
            return -(-batches // self.num_replicas)
        mine = len(range(self.rank, len(self.lengths), self.num_replicas))
        return -(-mine // self.batch_size)

    # A generator, so that the epoch is read at the first batch: Lightning sets it after it has called `iter`.
    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            batches = self._shuffled()
            for turn in range(self.rank, len(self) * self.num_replicas, self.num_replicas)[self.first :]:
                yield batches[turn % len(batches)]
        else:
            mine = self._longest_first(np.arange(len(self.lengths)))[self.rank :: self.num_replicas]
            for start in range(0, len(mine), self.batch_size):
                yield mine[start : start + self.batch_size].tolist()

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]

    def _shuffled(self) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        stretch = _MEGA_BATCH * self.batch_size
        batches = []
        for start in range(0, len(order), stretch):
            rows = self._longest_first(order[start : start + stretch])
            batches += [rows[cut : cut + self.batch_size].tolist() for cut in range(0, len(rows), self.batch_size)]
        generator.shuffle(batches)
        return batches


def load_tokenizer(name: str, generates: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can tokenise and pad batches.

    Args:
        name: A folder, a hub id, or a `package://` path.
        generates: Whether it is a language model's. It then needs a token that ends a text, which is also the pad token
            where there is none: padding is masked by position, so the two are never confused.

    Raises:
        DataError: It cannot be loaded, has no vocabulary, or lacks the pad token (generating: the end token).
    """
    folder = resolve(name)
    if folder.startswith((".", "/")) and not Path(folder).exists():
        raise DataError(f"no tokenizer folder {folder}{meant_path(folder)}")
    if Path(folder).is_file():  # a checkpoint, for one
        raise DataError(f"{folder} is a file; name the folder of a model, such as RUN/model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # Damaged files raise whatever the parser stumbles over, KeyError for example.
    except Exception as error:
        tried = "its files are damaged or missing"
        if not Path(folder).is_dir():
            tried = "no such folder, and not found as a hub id; offline, only what was downloaded before is found"
        raise DataError(f"cannot load tokenizer {name!r} ({tried}): {error!r}") from error
    # transformers 5 invents an empty tokenizer for a folder with a config.json and no tokenizer files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            f"tokenizer {name!r} has no vocabulary: are its files (tokenizer.json, vocab.txt) in the folder?"
        )
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name!r} ({type(tokenizer).__name__}) is a slow one: convert it to tokenizer.json")
    if generates:
        if tokenizer.eos_token is None:
            raise DataError(
                f"tokenizer {name!r} has no EOS token, so no text could end: set tokenizer.eos_token, save_pretrained "
                "it to a folder and name that folder"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise DataError(
            f"tokenizer {name!r} has no pad token: give it one (tokenizer.pad_token = tokenizer.eos_token), "
            "save_pretrained it to a folder and name that folder"
        )
    return tokenizer


def is_encoder_decoder(name: str) -> bool:
    """Says whether a model's folder holds an encoder-decoder; False without a configuration."""
    folder = resolve(name)
    if folder.startswith((".", "/")) and not Path(folder).exists():
        raise DataError(f"no model folder {folder}")
    if Path(folder).is_dir() and not (Path(folder) / "config.json").exists():
        return False
    try:
        return bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the model configuration beside tokenizer {name!r}: {error}") from error


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text_columns: Sequence[str], max_length: int
) -> Dataset:
    """Tokenise a data set, or take the result of an earlier run from the cache of `datasets`.

    Args:
        dataset: Rows with the text columns.
        tokenizer: A fast tokenizer.
        text_columns: One column, or two that become a pair.
        max_length: Tokens to keep per row, special tokens included.

    Returns:
        The rows with the tokenizer's outputs and `length` in place of the text columns.

    Raises:
        DataError: `max_length` leaves no room for text, or is more than the tokenizer allows.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2)
    # Below this the tokenizer would silently not truncate.
    if max_length < special + len(text_columns):
        raise DataError(
            f"max_length is {max_length}, but {special} special tokens and one token of each of "
            f"{', '.join(text_columns)} need {special + len(text_columns)}"
        )
    if max_length > tokenizer.model_max_length:
        raise DataError(f"max_length is {max_length}, but the tokenizer's limit is {tokenizer.model_max_length}")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = tokenizer(*(rows[column] for column in text_columns), truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return dataset.map(
        encode,
        batched=True,
        remove_columns=list(text_columns),
        # The default fingerprint hashes the tokenizer, which changes with use: the cache would never be hit.
        new_fingerprint=fingerprint(dataset, tokenizer, list(text_columns), max_length),
        desc="Tokenising",
    )


def fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *parts: Any) -> str:
    """Returns the name under which the cache of `datasets` finds a tokenised data set.

    Args:
        dataset: The rows.
        tokenizer: A fast tokenizer; its settings of the moment (truncation, padding) do not matter.
        *parts: All else that the result depends on, as JSON types.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # the last call's settings
    content["truncation"] = content["padding"] = None
    whole = [dataset._fingerprint, content, tokenizer.model_input_names, tokenizer.truncation_side, *parts]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def one_or_all(loaders: list[Loader]) -> Loader | list[Loader]:
    """Returns the only loader, or the list of all."""
    return loaders[0] if len(loaders) == 1 else loaders


class Collate:
    """Pads tokenised rows to the longest of their batch, rounded up to a multiple of 8.

    Args:
        tokenizer: Knows the pad token and side.
        label_dtype: `torch.long` for classes, `torch.float32` for numbers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, label_dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.label_dtype = label_dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in rows[0]]
        encoding = BatchEncoding({name: [row[name] for row in rows] for name in inputs})
        padded = self.tokenizer.pad(encoding, pad_to_multiple_of=8, return_tensors="pt")
        if "label" not in rows[0]:  # rows to predict
            return dict(padded)
        return {**padded, "labels": torch.tensor([row["label"] for row in rows], dtype=self.label_dtype)}

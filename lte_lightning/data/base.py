"""Base of all data modules: reading splits, holding rows out, batches of similar length."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lte_lightning.data.checks import rename_only_column, require_at_least, require_columns, rows_of
from lte_lightning.data.files import TABLES, find_split, other_files, read_shards, read_split, suffix_of
from lte_lightning.data.labels import listed
from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import BucketBatchSampler, Loader, load_tokenizer, one_or_all

_HOLDOUT = 0.1
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class TextData(LightningDataModule):
    """Rows of text from the hub or a folder; a subclass defines a row and tokenises it.

    Args:
        task: Name of the task, for the results.
        tokenizer: Folder, hub id or `package://` path of the tokenizer.
        source: Folder with the task's files, one file, or id of a data set on the hub.
        subset: Name of the hub data set's configuration.
        revision: Branch or commit of the hub data set.
        max_length: Tokens per row at most.
        batch_size: Rows per training batch and device.
        eval_batch_size: Rows per evaluation batch and device.
        holdout: Share of the training rows, up to 0.5, that becomes the validation set. By default a tenth of a source
            that has no validation rows, and else none.
        train_rows: Train on a random subset of this many rows; all of them by default.
        seed: Decides the holdout, the subset and the order of training batches.

    Attributes:
        skipped: How many rows of each role were left out because they could not be used.
    """

    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    columns: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()  # columns that are optional in rows to predict
    title: str | None = None  # in tables, where the name of the task differs from that of the data
    hint = ""  # advice for a missing column
    formats: tuple[str, ...] = TABLES
    generates = False  # whether the tokenizer is a language model's
    predict_role = "test"  # splits to predict

    def __init__(
        self,
        task: str,
        tokenizer: str,
        source: str,
        subset: str | None = None,
        revision: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        holdout: float | None = None,
        train_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if holdout is not None and not 0 <= holdout <= 0.5:
            raise DataError(f"holdout is {holdout}, but must be a share of the training rows from 0 to 0.5")
        require_at_least(
            max_length=(max_length, 2),
            batch_size=(batch_size, 1),
            eval_batch_size=(eval_batch_size, 1),
            train_rows=(train_rows, 1),
            seed=(seed, 0),
        )
        self.task = task
        self.source = str(Path(source).expanduser()) if source.startswith("~") else source
        self.subset = subset
        self.revision = revision
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.holdout = holdout
        self.train_rows = train_rows
        self.seed = seed
        self.skipped: dict[str, int] = {}
        self._tokenizer_name = tokenizer
        self._ready: dict[str, list[Dataset]] = {}

    # The task, by the subclass

    def prepare(self, role: str) -> list[Dataset]:
        """Returns the tokenised rows of `train`, `validation` or `test`, one data set for each loader."""
        raise TypeError(f"{type(self).__name__} must define prepare")

    def collate(self) -> Collate:
        """Returns the function that makes a batch of tokenised rows."""
        raise TypeError(f"{type(self).__name__} must define collate")

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks the rows of a split, whose number and columns are checked already."""

    def has_targets(self, rows: Dataset) -> bool:
        """Says whether a test split can be scored."""
        return set(self.columns) <= set(rows.column_names)

    # Rows

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first needed."""
        return load_tokenizer(self._tokenizer_name, self.generates)

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split that the source has, one file as the training rows; a subclass may read its own."""
        if not self.is_local:
            return self.load_from_hub()
        if self.is_file:
            return {"train": self.read("train")}
        names = self._split_names
        splits = {name: self.read(name) for name in names if find_split(self.source, name, self.formats)}
        splits = splits or read_shards(self.source, names)
        if splits and (unread := other_files(self.source, names, self.formats)):
            rank_zero_info(f"not read in {self.source}: {listed(unread)}; the splits are {', '.join(names)}")
        return splits

    def read(self, split: str) -> Dataset:
        """Returns the rows of a local split."""
        return read_split(self.source, split, formats=self.formats)

    def load_from_hub(self, **how: bool) -> dict[str, Any]:
        """Returns every split of the hub's data set."""
        options = {"revision": self.revision} if self.revision else {}
        try:
            return dict(load_dataset(self.source, self.subset, **options, **how))
        except (OSError, ValueError) as error:
            raise DataError(
                f"no folder {self.source!r}, and cannot load {self.subset or self.task} from the hub's data set of "
                f"that name (offline, only what was downloaded before is found): {error}"
            ) from error

    @property
    def _split_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("train", *self.validation_splits, "test", *self.test_splits)))

    @property
    def is_local(self) -> bool:
        """Says whether the source is a folder or a file here, and not an id on the hub."""
        is_path = self.source.startswith((".", "/")) or self.source.endswith("/")
        return is_path or Path(self.source).exists() or suffix_of(self.source) in self.formats

    @property
    def is_file(self) -> bool:
        """Says whether the source is one file."""
        return Path(self.source).is_file()

    def setup(self, stage: str) -> None:
        """Read, check and tokenise the rows of the stage that no earlier stage has prepared."""
        roles = {"fit": ("train", "validation"), "validate": ("validation",), "predict": (self.predict_role,)}
        for role in roles.get(stage, ("test",)):
            if role not in self._ready:
                self._ready[role] = self.prepare(role)

    def rows(self, role: str) -> list[Dataset]:
        """Returns the checked rows of a role.

        Validation takes held-out rows, or else the validation splits. A test takes these splits if rows are held out
        beside them; or else a labelled test split; or else what validation takes. A file may be tested whole.
        """
        splits = self._splits
        if role == "train":
            return [self._training_rows(self.split("train"))[0]]
        input_columns = [column for column in self.columns if column not in self.targets]
        if self.is_file and (role == "predict" or (role == "test" and not self.holdout)):
            return [self.split("train", input_columns if role == "predict" else None)]
        if role == "predict" and (names := [name for name in self.test_splits if name in splits]):
            return [self.split(name, input_columns) for name in names]
        only_held_out = self.holdout and not any(name in splits for name in self.validation_splits)
        labelled = role != "validation" and "test" in splits and self.has_targets(splits["test"])
        if labelled and (only_held_out or not self.holdout):
            return [self.split("test")]
        if only_held_out or (self.holdout and role == "validation"):
            if role == "test":
                share = f"{len(self.held_out())} of {len(splits['train'])}"
                rank_zero_info(f"testing on held-out rows, {share} of {self.source}; data.holdout 0 tests on all")
            return [self.held_out()]
        if self.is_file:
            raise DataError(
                f"{self.source} is one file, and none of its rows are held out for validation: set data.holdout, to "
                "0.1 for example, or name a folder with train.* and validation.*"
            )
        return [self.split(name) for name in self.validation_splits]

    def held_out(self) -> Dataset:
        """Returns the training rows that are not trained on."""
        return self._training_rows(self.split("train"))[1]

    def split(self, name: str, columns: Sequence[str] | None = None) -> Dataset:
        """Returns a split's columns, checked; by default all that training needs."""
        if name not in self._splits:
            there = other_files(self.source, self._split_names, self.formats)
            raise DataError(
                f"{self.source} has no split {name!r} for {self.task} (found: {', '.join(self._splits) or 'none'}); "
                f"a folder needs {name}{self.formats[0]}, or {', '.join(self.formats[1:])}"
                + (f"; it has {listed(there)}: name that instead, or rename it" if there else "")
            )
        rows, where = self._splits[name], self._name(name)
        if len(rows) == 0:
            raise DataError(f"{where} has no rows")
        rows, columns = rename_only_column(rows, columns or (), where), list(columns or self.columns)
        require_columns(rows, columns, where, self.hint)
        rows = rows.select_columns(columns)
        self.check_rows(rows, where)
        return rows

    @functools.cached_property
    def _splits(self) -> dict[str, Dataset]:
        splits = self.load_splits()
        if self.holdout is None:
            has_validation = any(name in splits for name in self.validation_splits)
            self.holdout = 0.0 if has_validation or "train" not in splits else _HOLDOUT
        return splits

    def _training_rows(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        held_out = max(1, round(self.holdout * len(rows))) if self.holdout else 0
        size = len(rows) - held_out
        if self.train_rows is not None and self.train_rows > size:
            raise DataError(f"train_rows is {self.train_rows}, but {self._name('train')} has {size} rows for training")
        if held_out and size < 1:
            raise DataError(
                f"{self._name('train')} has {len(rows)} row: too few to hold one out for validation: add rows"
            )
        order = self.shuffled(rows, held_out)
        chosen = order[held_out:][: self.train_rows]
        return rows.select(np.sort(chosen)), rows.select(np.sort(order[:held_out]))

    def shuffled(self, rows: Dataset, held_out: int) -> np.ndarray:
        """Returns the order in which training rows are chosen; the first ``held_out`` are not trained on."""
        return np.random.default_rng(self.seed).permutation(len(rows))

    def _skip(self, role: str, rows: int, skipped: int, why: str) -> None:
        if skipped:
            self.skipped[role] = skipped
            rank_zero_warn(f"{skipped} of {rows} {rows_of(role)} are left out: {why}")

    def _name(self, split: str) -> str:
        return f"{self.task}/{split} from {self.source}"

    # Batches

    def train_dataloader(self) -> Loader:
        """Shuffled batches, drawn anew in each epoch."""
        return self.loader(self._ready["train"][0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Every validation row once; a list for a task with several validation sets."""
        return one_or_all([self.loader(rows, self.eval_batch_size) for rows in self._ready["validation"]])

    def test_dataloader(self) -> Loader | list[Loader]:
        """Every test row once."""
        return one_or_all([self.loader(rows, self.eval_batch_size) for rows in self._ready["test"]])

    def predict_dataloader(self) -> Loader | list[Loader]:
        """The rows to predict in the order of their file, because predictions are matched with it."""
        return one_or_all([self.loader_in_order(rows, self.collate()) for rows in self._ready[self.predict_role]])

    def loader(self, rows: Dataset, batch_size: int, shuffle: bool = False) -> Loader:
        """Returns batches of rows of similar length."""
        expect_no_workers()
        batches = BucketBatchSampler(rows["length"][:], batch_size, shuffle, self.seed, *self.processes())
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collate())

    def loader_in_order(self, rows: Dataset, collate: Collate) -> Loader:
        """Returns evaluation batches in the order of the rows."""
        expect_no_workers()
        return DataLoader(
            rows,
            # By keyword: Lightning makes a loader for predictions again, from the arguments that it saw.
            batch_size=self.eval_batch_size,
            # Lightning leaves a DistributedSampler alone, whatever use_distributed_sampler says.
            sampler=UnrepeatedDistributedSampler(rows, *self.processes(), shuffle=False),
            collate_fn=collate,
        )

    def processes(self) -> tuple[int, int]:
        """Returns how many processes share the rows, and the rank of this process."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def expect_no_workers() -> None:
    """Silences Lightning's advice to use worker processes."""
    # The rows are tokenised and mapped into memory: handing a batch over would cost more than making it.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")

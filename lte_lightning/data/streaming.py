"""Training rows that are read and tokenised during the fit, for sets that fit neither in memory nor on the disk."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchStream

from lte_lightning.data.base import TextData, expect_no_workers
from lte_lightning.data.checks import require_at_least, require_columns
from lte_lightning.data.files import find_split, stream_split
from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import BucketBatchSampler, Loader

Mark = tuple[int, ...]  # where a tokenised row begins: the pass over the data, the row, perhaps the token in it
_CHUNK = 256  # rows tokenised at a time


class StreamedBatches(TorchStream[list[dict[str, Any]]]):
    """Batches of an endless stream of tokenised rows.

    The stream is cut into buffers. A buffer is shuffled and cut into batches of similar length, as `BucketBatchSampler`
    does it with a whole data set. A batch depends on the seed and its number alone, so a resumed fit can start at any
    batch. Every process reads the whole stream and takes its own batches.

    Args:
        rows: `rows(mark)` tokenises from a mark on. It yields pairs of mark and row, a dictionary with its `length`.
        first: The mark of the first row.
        buffer: Rows to shuffle at a time at least; it is rounded up to whole batches of all processes.
        batch_size: Rows per batch and process.
        seed: With the number of the buffer, decides the shuffling.
        replicas: Number of processes.
        rank: The number of this process.
    """

    def __init__(
        self,
        rows: Callable[[Mark], Iterator[tuple[Mark, dict[str, Any]]]],
        first: Mark,
        buffer: int,
        batch_size: int,
        seed: int,
        replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self._batches = -(-buffer // (batch_size * replicas))  # of each process
        self._size = self._batches * batch_size * replicas
        self._order = (batch_size, True, seed, replicas, rank)
        self._rows = rows
        self._marks: dict[int, Mark] = {0: first}
        self._held: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._next: Iterator[tuple[Mark, dict[str, Any]]] = iter(())
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Go to a batch, counted from 0 in this process; the next iteration begins there."""
        self._batch = batch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yields batches, as lists of rows, without end."""
        buffer, first_batch = divmod(self._batch, self._batches)
        while True:
            rows = self._buffer(buffer)
            sampler = BucketBatchSampler([row["length"] for row in rows], *self._order)
            sampler.begin(buffer, first_batch)
            for indices in sampler:
                yield [rows[i] for i in indices]
            buffer, first_batch = buffer + 1, 0

    def _buffer(self, number: int) -> list[dict[str, Any]]:
        if self._held[0] == number:
            return self._held[1]
        # The rows go on from the held buffer. They are begun anew, at the nearest known mark, if nothing is held yet
        # (its number is -1), if the held buffer is a later one, or if a known mark is nearer.
        following = self._held[0] + 1
        nearest = max(known for known in self._marks if known <= number)
        if following == 0 or not nearest <= following <= number:
            following = nearest
            self._next = self._rows(self._marks[following])
        for current in range(following, number + 1):
            marked = list(islice(self._next, self._size))
            self._held = (current, [row for _, row in marked])
            self._marks[current] = marked[0][0]
        return self._held[1]

    def state_dict(self) -> dict[str, Any]:
        """Returns where each buffer begins, so that a resumed fit need not tokenise earlier rows again."""
        return {"size": self._size, "marks": {number: list(mark) for number, mark in self._marks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores where buffers begin; ignores the state if the buffer size changed."""
        if state["size"] == self._size:
            self._marks |= {number: tuple(mark) for number, mark in state["marks"].items()}


class StreamingData(TextData):
    """Rows of text whose training split may be streamed; a subclass tokenises a pass over it.

    Args:
        streaming: Read and tokenise the training rows during the fit, pass after pass, instead of before it: for
            sets that do not fit on the disk. Stages are then given in steps.
        shuffle_buffer: Rows of a stream to shuffle at a time; they are in memory, tokenised.
        **kwargs: See `TextData`.
    """

    first: Mark = (0,)  # the mark of a pass's first tokenised row

    def __init__(self, streaming: bool = False, shuffle_buffer: int = 10_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_at_least(shuffle_buffer=(shuffle_buffer, 1))
        if streaming and self.holdout:
            raise DataError(
                f"holdout is {self.holdout}, but a stream has no known number of rows; set holdout to 0, and "
                "give the source a validation split"
            )
        if streaming and self.train_rows:
            raise DataError(f"train_rows is {self.train_rows}, but a stream trains from its first row on; leave it out")
        if streaming:
            self.holdout = 0.0
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self._stream: StreamedBatches | None = None

    def encode_pass(self, mark: Mark) -> Iterator[tuple[Mark, dict[str, Any]]]:
        """Yields (mark, row) pairs of one pass of tokenised rows from a mark on, without the number of the pass."""
        raise TypeError(f"{type(self).__name__} must define encode_pass")

    def encode(self, mark: Mark) -> Iterator[tuple[Mark, dict[str, Any]]]:
        """Yields (mark, row) pairs of tokenised rows, pass after pass, beginning at a mark."""
        number, position = mark[0], mark[1:]
        while True:
            yielded = 0
            for position_after, row in self.encode_pass(position):
                yielded += 1
                yield (number, *position_after), row
            if not yielded and position == self.first:
                raise DataError(f"no row of {self._name('train')} can be trained on (max_length {self.max_length})")
            number, position = number + 1, self.first

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split that the source has, but not the training rows of a stream."""
        if not self.streaming:
            return super().load_splits()
        names = dict.fromkeys((*self.validation_splits, "test", *self.test_splits))
        if self.is_file:
            raise DataError(
                f"{self.source} is one file, and a stream's rows cannot be held out: name a folder with train.* and "
                f"{self.validation_splits[0]}.*"
            )
        if self.is_local:
            return {name: self.read(name) for name in names if find_split(self.source, name, self.formats)}
        splits = self.load_from_hub(streaming=True)
        return {name: Dataset.from_list(list(splits[name])) for name in names if name in splits}

    def open_stream(self) -> IterableDataset:
        """Returns the training rows, unread."""
        if self.is_local:
            return stream_split(self.source, "train", self.formats)
        rows = self.load_from_hub(streaming=True)
        if "train" not in rows:
            raise DataError(f"{self.source} has no split 'train' for {self.task} (found: {', '.join(rows)})")
        return rows["train"]

    def chunks(self, row: int) -> Iterator[tuple[int, Dataset]]:
        """Yields (number of the first row, chunk of checked training rows), starting at ``row``."""
        name = self._name("train")
        stream = iter(self.open_stream().skip(row).iter(batch_size=_CHUNK))
        while True:
            where = f"{name}, after {row} rows" if row else name
            try:
                rows = Dataset.from_dict(next(stream))
            except StopIteration:
                if row == 0:
                    raise DataError(f"{name} has no rows") from None
                return
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {where}: {error.__cause__ or error}") from error
            require_columns(rows, self.columns, where, self.hint)
            rows = rows.select_columns(list(self.columns))
            self.check_rows(rows, where)
            yield row, rows
            row += len(rows)

    def setup(self, stage: str) -> None:
        """Read, check and tokenise what the stage needs; of a stream only its beginning."""
        if self.streaming and stage == "fit" and self._stream is None:
            _ = self._splits
            next(self.encode((0, *self.first)))  # errors in the first rows come now
            order = (self.shuffle_buffer, self.batch_size, self.seed, *self.processes())
            self._stream = StreamedBatches(self.encode, (0, *self.first), *order)
            self._ready["train"] = []
        super().setup(stage)

    def train_dataloader(self) -> Loader:
        """Shuffled batches; of a stream without end, from the place that the fit has reached."""
        if self._stream is None:
            return super().train_dataloader()
        expect_no_workers()
        return DataLoader(self._stream, batch_size=None, collate_fn=self.collate())

    def begin(self, batch: int) -> None:
        """Go to a batch, counted from 0, if there is a stream."""
        if self._stream is not None:
            self._stream.begin(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict()} if self._stream else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stream:
            self._stream.load_state_dict(state_dict["stream"])

"""Language modelling: running text, packed into blocks of equal length."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Value, concatenate_datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lte_lightning.data.blocks import CollateBlocks, PackedBlocks
from lte_lightning.data.checks import count_blank, require_columns, require_text
from lte_lightning.data.files import FORMATS, TABLES, find_files, find_split, read_split, suffix_of
from lte_lightning.data.labels import listed
from lte_lightning.data.packaged import DataError
from lte_lightning.data.streaming import Mark, StreamingData
from lte_lightning.data.text import BucketBatchSampler, Loader, fingerprint

_HEADING = re.compile(
    r"\s= [^=].*[^=] =\s*"
)  # WikiText's heading of an article; those of its sections have two or more
_BEGINS = "begins a document"
_WORD = re.compile(r"\S+")


class LanguageModelData(StreamingData):
    """Running text as one stream of tokens, cut into blocks, for training and for perplexity.

    An EOS token stands before, between and after documents. Attention crosses it: a block may hold the end of
    one document and the beginning of the next, as is usual in fine-tuning GPT-2 and LLaMA. Each block begins with
    the token that the block before ends with, so that every token of the text, and the EOS after each document, is
    predicted exactly once, from at most `block_size` - 1 tokens before it. Perplexity per word divides the same loss by
    the number of words of the raw text, as split at white space. Tokens stay on disk, mapped into memory.

    Args:
        tokenizer: Folder, hub id or `package://` path of the tokenizer: that of the model.
        source: One file of text (txt, md) or with a column of text (jsonl, json, csv, tsv, parquet), compressed or not;
            folder with train.* and perhaps validation.*; any other folder, of which all such files are read, in the
            order of their names; or id of a data set on the hub.
        subset: Name of the hub data set's configuration.
        revision: Branch or commit of the hub data set.
        text: Name of the column of text.
        documents: What a document is: `heading`, everything from one WikiText heading of an article to the next (lines
            keep their line breaks); `row`, a line of text or a row of a table, unless it is blank; `whole`, a file;
            `auto`, each file of text and each row of a table.
        block_size: Tokens per block.
        batch_size: Blocks per training batch and device.
        eval_batch_size: Blocks per evaluation batch and device.
        shuffle_buffer: Blocks of a stream to shuffle at a time; they are in memory, tokenised.
        holdout: Share of the training rows, up to 0.5, that becomes the validation set: the last rows, or random
            ones if each is a document. By default a tenth of a source that has no validation rows, and else none.
        **kwargs: See `StreamingData`.
    """

    generates = True
    formats = (*FORMATS, ".md")
    hint = "; set data.text to your column's name"
    first = (0, 0)

    def __init__(
        self,
        tokenizer: str,
        source: str = "Salesforce/wikitext",
        subset: str | None = "wikitext-103-raw-v1",
        revision: str | None = None,
        text: str = "text",
        documents: Literal["auto", "heading", "row", "whole"] = "heading",
        block_size: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        shuffle_buffer: int = 1_000,
        holdout: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            task=subset if subset and "wikitext" in subset else "lm",
            tokenizer=tokenizer,
            source=source,
            subset=subset,
            revision=revision,
            max_length=block_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            shuffle_buffer=shuffle_buffer,
            holdout=holdout,
            train_rows=None,
            **kwargs,
        )
        self.text = text
        self.columns = (text,)
        self.documents = documents
        if self.is_local:
            self.task = "lm"

    def load_splits(self) -> dict[str, Dataset]:
        """Read every split that the source has; of a folder without them all files are training rows."""
        splits = super().load_splits()
        files = [Path(self.source)] if self.is_file else []
        if self.is_local and not (self.is_file or self.streaming):
            files = [file for name in self._split_names if (file := find_split(self.source, name, self.formats))]
            if not splits:
                files = self._text_files()
                splits = {"train": self._joined(files)} if files else {}
        if self.documents == "auto":
            is_text = any(suffix_of(file) not in TABLES for file in files)
            self.documents = "whole" if is_text else "row"
        return splits

    def read(self, split: str) -> Dataset:
        """Returns the rows of a local split."""
        file = find_split(self.source, split, self.formats)
        if file is None:
            raise DataError(f"{self.source} has no file of the split {split}")
        return self._read(file)

    def _read(self, file: Path) -> Dataset:
        rows = read_split(file, file.stem, formats=self.formats)
        # The lines of a file of text come as "text"
        is_named = suffix_of(file) in TABLES or self.text == "text"
        return rows if is_named else rows.rename_column("text", self.text)

    def _text_files(self) -> list[Path]:
        """Returns the files of text in the folder, and says which files are not read."""
        files = find_files(self.source)
        readable = [file for file in files if suffix_of(file) in self.formats and file.stat().st_size]
        if unread := [file.relative_to(self.source) for file in files if file not in readable]:
            rank_zero_info(f"not read in {self.source}, since empty or of another kind: {listed(unread)}")
        return readable

    def _joined(self, files: list[Path]) -> Dataset:
        """Returns the rows of several files, and whether each begins a document: a file of text, a row of a table."""
        parts = []
        for file in files:
            rows = self._read(file)
            require_columns(rows, [self.text], str(file), self.hint)
            require_text(rows, [self.text], str(file))
            begins = [suffix_of(file) in TABLES or row == 0 for row in range(len(rows))]
            texts = rows.select_columns([self.text]).cast_column(self.text, Value("string"))
            parts.append(texts.add_column(_BEGINS, begins))
        self.columns = (self.text, _BEGINS)
        return concatenate_datasets(parts)

    def check_rows(self, rows: Dataset, name: str) -> None:
        """Checks that there is text."""
        require_text(rows, (self.text,), name)
        if not any(text.strip() for text in rows[self.text]):
            raise DataError(f"{name} has no text")

    def shuffled(self, rows: Dataset, held_out: int) -> np.ndarray:
        """Returns the training rows in the order of choice; running text gives its end first."""
        if self.documents == "row":
            return super().shuffled(rows, held_out)
        return np.roll(np.arange(len(rows)), held_out)

    def _training_rows(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        """Returns what is trained on and what is held out; a line that holds much of a running text is cut."""
        if self.documents == "row" or not self.holdout:
            return super()._training_rows(rows)
        ends = np.cumsum([len(text.strip()) for text in rows[self.text]])
        held_out = max(1, round(self.holdout * len(rows)))
        share = 1 - (ends[-held_out - 1] if held_out < len(rows) else 0) / ends[-1]
        if self.holdout / 2 <= share <= self.holdout * 2:
            return super()._training_rows(rows)
        cut = int((1 - self.holdout) * ends[-1])
        line = int(np.searchsorted(ends, cut, side="right"))
        start = int(ends[line - 1]) if line else 0
        if ends[line] - start <= self.holdout * ends[-1] / 2:  # a short line is held out whole
            return rows.select(range(line)), rows.select(range(line, len(rows)))
        text, place = rows[line][self.text], cut - start
        place = text.rfind(" ", 0, place) + 1 or place
        halves = [
            Dataset.from_list([rows[line] | {self.text: half}], features=rows.features)
            for half in (text[:place], text[place:])
        ]
        before = [rows.select(range(line))] if line else []
        after = [rows.select(range(line + 1, len(rows)))] if line + 1 < len(rows) else []
        return concatenate_datasets([*before, halves[0]]), concatenate_datasets([halves[1], *after])

    def prepare(self, role: str) -> list[Any]:
        """Tokenises the text and packs it."""
        (rows,) = self.rows(role)
        if not any(text.strip() for text in rows[self.text]):
            raise DataError(f"the {len(rows)} rows of {self.source} for {role} have no text; set another data.holdout")
        if self.documents == "row" and (blank := count_blank(rows[self.text])):
            rank_zero_info(f"{blank} of {len(rows)} rows of {self.source} for {role} are empty, and no documents")
        encoded = rows.map(
            self._encode,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            new_fingerprint=fingerprint(rows, self.tokenizer, "packed", self.documents),
            desc=f"Tokenising {role}",
        )
        return [PackedBlocks(encoded, self.max_length, self.tokenizer.eos_token_id)]

    def encode_pass(self, mark: Mark) -> Iterator[tuple[Mark, dict[str, Any]]]:
        """Yields the blocks of the text, from one that begins with a token of a row."""
        beginning, done = mark
        # Tokens that are not in a block yet: the token, the words that begin in it, its row, its place in the row.
        rest_4T = np.zeros((4, 0), dtype=np.int32)
        for first, rows in self.chunks(beginning):
            encoded = self._encode(rows[:], list(range(first, first + len(rows))))
            parts = enumerate(zip(encoded["ids"], encoded["words"], strict=True), first)
            read_4T = [
                np.stack([ids, words, np.full(len(ids), row), np.arange(len(ids))], dtype=np.int32)
                for row, (ids, words) in parts
            ]
            rest_4T = np.concatenate([rest_4T, *read_4T], axis=1)[:, done if first == beginning else 0 :]
            while rest_4T.shape[1] > self.max_length:
                yield _block(rest_4T[:, : self.max_length])
                rest_4T = rest_4T[:, self.max_length - 1 :]
        rest_4T = np.pad(rest_4T, ((0, 0), (0, 1)))
        rest_4T[0, -1] = self.tokenizer.eos_token_id
        while rest_4T.shape[1] > 1:
            yield _block(rest_4T[:, : self.max_length])
            rest_4T = rest_4T[:, self.max_length - 1 :]

    def _encode(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [text.rstrip("\r\n") for text in rows[self.text]]
        if self.documents == "row":
            starts = [bool(text.strip()) for text in texts]
            pieces = [text if start else "" for text, start in zip(texts, starts, strict=True)]
        else:
            pieces = [f"{text}\n" for text in texts]
            begins = rows.get(_BEGINS, [False] * len(texts))
            starts = [index == 0 or begin for index, begin in zip(indices, begins, strict=True)]
            if self.documents == "heading":
                starts = [first or bool(_HEADING.fullmatch(text)) for first, text in zip(starts, pieces, strict=True)]
        encoded = self.tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)
        columns: dict[str, list[Any]] = {"ids": [], "words": []}
        for piece, start, ids, offsets in zip(
            pieces, starts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            words = count_words(piece, offsets)
            columns["ids"].append(np.array(([self.tokenizer.eos_token_id] if start else []) + ids, dtype=np.int32))
            columns["words"].append(np.concatenate([np.zeros(int(start), dtype=np.int8), words]))
        return columns

    def collate(self) -> CollateBlocks:
        """Pads the last block, which may be shorter."""
        return CollateBlocks(self.tokenizer.pad_token_id)

    def loader(self, rows: Any, batch_size: int, shuffle: bool = False) -> Loader:
        """Returns batches of blocks."""
        batches = BucketBatchSampler(rows.lengths, batch_size, shuffle, self.seed, *self.processes())
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collate())


def _block(tokens_4T: np.ndarray) -> tuple[Mark, dict[str, Any]]:
    ids, words, rows, places = tokens_4T
    row = {"input_ids": ids.copy(), "words": int(words[1:].sum()), "length": len(ids)}
    return (int(rows[0]), int(places[0])), row


def count_words(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Returns how many words begin in each token, [T] int8.

    Args:
        text: The tokenised text.
        offsets: Where each token begins and ends in it; tokens within one character share its place.
    """
    starts = np.array([match.start() for match in _WORD.finditer(text)], dtype=np.int64)
    ends_T = np.array([end for _, end in offsets], dtype=np.int64).reshape(-1)
    begun_T = np.maximum.accumulate(np.searchsorted(starts, ends_T)) if len(ends_T) else ends_T
    return np.diff(begun_T, prepend=0).astype(np.int8)

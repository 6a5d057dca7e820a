"""Training rows as a stream: nothing lost, nothing repeated, the same batch however one gets to it."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset

from lte_lightning.data import DataError, GenerationData, InstructData, LanguageModelData
from lte_lightning.data.streaming import StreamedBatches


def numbered(mark, rows=10):
    """Rows 0 to 9, over and over: the shortest are the even ones."""
    turn, row = mark
    while True:
        for i in range(row, rows):
            yield (turn, i), {"row": i, "turn": turn, "length": 1 + i % 2}
        turn, row = turn + 1, 0


def stream(**options):
    return StreamedBatches(numbered, (0, 0), **{"buffer": 20, "batch_size": 2, "seed": 0, **options})


def drawn(batches, count):
    return [[(row["turn"], row["row"]) for row in batch] for batch in islice(batches, count)]


def test_every_row_comes_once_in_a_pass():
    batches = drawn(stream(), 20)
    for turn in range(4):
        assert sorted(row for batch in batches for of, row in batch if of == turn) == list(range(10))
    assert len({len(batch) for batch in batches}) == 1


def test_rows_are_shuffled_within_a_buffer_by_seed_and_batched_by_length():
    first, again, other = drawn(stream(), 10), drawn(stream(), 10), drawn(stream(seed=1), 10)
    assert first == again != other
    assert drawn(stream(), 20)[10:] != first
    assert {place for batch in first for place in batch} == {place for batch in other for place in batch}
    assert [row for batch in first for _, row in batch] != [*range(10)] * 2
    assert all(first_row % 2 == second_row % 2 for (_, first_row), (_, second_row) in first)


@pytest.mark.parametrize("place", [3, 10, 11, 25])
def test_a_batch_is_the_same_however_one_gets_to_it(place):
    expected = drawn(stream(), 40)[place : place + 15]
    fresh = stream()
    fresh.begin(place)
    assert drawn(fresh, 15) == expected
    used = stream()
    drawn(used, 33)
    used.begin(place)
    assert drawn(used, 15) == expected


def test_a_state_spares_what_lies_before_it():
    used = stream()
    drawn(used, 31)
    state = json.loads(json.dumps(used.state_dict()), object_hook=lambda d: {_number(k): v for k, v in d.items()})
    asked = []

    def watched(mark):
        asked.append(mark)
        return numbered(mark)

    resumed = StreamedBatches(watched, (0, 0), buffer=20, batch_size=2, seed=0)
    resumed.load_state_dict(state)
    resumed.begin(31)
    assert drawn(resumed, 15) == drawn(stream(), 46)[31:]
    assert asked == [(6, 0)]  # three buffers of 20 rows, six passes
    other = StreamedBatches(watched, (0, 0), buffer=30, batch_size=2, seed=0)
    other.load_state_dict(state)  # its buffers begin elsewhere
    other.begin(31)
    assert drawn(other, 1) == drawn(stream(buffer=30), 32)[31:]


def _number(key):
    return int(key) if key.isdigit() else key


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_share_the_batches_of_one_buffer(replicas):
    parts = [drawn(stream(buffer=24, replicas=replicas, rank=rank), 12 // replicas) for rank in range(replicas)]
    together = [place for part in parts for batch in part for place in batch]
    assert len(together) == len(set(together)) == 24
    alone = drawn(stream(buffer=24), 12)
    assert [batch for batches in zip(*parts, strict=True) for batch in batches] == alone


# Data modules

E2E = [{"meaning_representation": f"name[{i}]", "human_reference": f"the cat eats {i}"} for i in range(700)]


@pytest.fixture
def lm_folder(make_lm_tokenizer, tmp_path):
    make_lm_tokenizer().save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def e2e(write_splits, lm_folder):
    def make(train=E2E, **options):
        source = write_splits(train=train, validation=E2E[:3])
        defaults = {"task": "e2e", "source": source, "max_length": 128, "max_new_tokens": 20, "batch_size": 4}
        return GenerationData(tokenizer=lm_folder, **{**defaults, "streaming": True, "shuffle_buffer": 40, **options})

    return make


def rows_of(batches):
    return sorted(
        (tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist()))
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    )


def test_a_pass_has_the_rows_that_are_read_otherwise(e2e):
    streamed, whole = e2e(shuffle_buffer=700), e2e(streaming=False)
    for data in (streamed, whole):
        data.setup("fit")
    found = rows_of(islice(streamed.train_dataloader(), 175))
    assert found == rows_of(whole.train_dataloader())
    assert len(set(found)) == 700
    assert rows_of(streamed.val_dataloader()) == rows_of(whole.val_dataloader())


def test_what_is_not_in_use_is_not_read(e2e):
    """A row that cannot be trained on is found when the stream comes to it."""
    data = e2e(train=[*E2E, {"meaning_representation": "a", "human_reference": None}])
    data.setup("fit")
    batches = iter(data.train_dataloader())
    assert len(rows_of(islice(batches, 50))) == 200
    with pytest.raises(DataError, match=r"e2e/train from .*, after 512 rows, row 188 .*human_reference is None"):
        list(islice(batches, 150))


def test_rows_left_out_are_counted_once(e2e):
    rows = [dict(row, human_reference=" ") if i % 100 == 7 else row for i, row in enumerate(E2E)]
    data = e2e(train=rows)
    with pytest.warns(UserWarning, match=r"training rows are left out, first row 7 .*count them"):
        data.setup("fit")
    found = rows_of(islice(data.train_dataloader(), 2 * 693 // 4))
    assert len(set(found)) == 693
    assert data.skipped == {"train": 7}
    resumed = e2e(train=rows)
    with pytest.warns(UserWarning, match="left out"):
        resumed.setup("fit")
    resumed.load_state_dict(data.state_dict())
    resumed.begin(330)
    assert len(rows_of(islice(resumed.train_dataloader(), 60))) == 240
    assert resumed.skipped == {"train": 7}


def test_conversations(write_splits, lm_folder):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": f"cat {i}"}]}
        for i in range(9)
    ]
    source = write_splits(train=rows, validation=rows[:2])
    options = {"max_length": 256, "max_new_tokens": 8, "batch_size": 3}
    data = InstructData(lm_folder, source, streaming=True, shuffle_buffer=9, **options)
    whole = InstructData(lm_folder, source, **options)
    for module in (data, whole):
        module.setup("fit")
    assert rows_of(islice(data.train_dataloader(), 3)) == rows_of(whole.train_dataloader())


@pytest.mark.parametrize("documents", ["heading", "row", "whole"])
def test_blocks_of_a_text(documents, lm_folder, tmp_path):
    lines = "".join(f" = The {i} = \n\n The cat eats the {'dog ' * (i % 7)}.\n" for i in range(100))
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "text" / f"{split}.txt").write_text(lines)
    options = {"documents": documents, "block_size": 16, "batch_size": 1}
    data = LanguageModelData(lm_folder, str(tmp_path / "text"), streaming=True, shuffle_buffer=1, **options)
    whole = LanguageModelData(lm_folder, str(tmp_path / "text"), **options)
    for module in (data, whole):
        module.setup("fit")
    expected = list(whole.train_dataloader())
    found = list(islice(data.train_dataloader(), len(expected)))
    assert rows_of(found) == rows_of(expected)
    assert sum(int(batch["words"]) for batch in found) == sum(int(batch["words"]) for batch in expected)
    for mark, block in islice(data.encode((0, 0, 0)), 1, len(expected) + 3, len(expected) // 4):
        again_mark, again = next(data.encode(mark))
        assert again_mark == mark
        assert np.array_equal(block["input_ids"], again["input_ids"])
        assert block["words"] == again["words"]


def test_from_the_hub_s_format(lm_folder, tmp_path, monkeypatch):
    """`datasets` opens a repository of Parquet files alike here and there."""
    for name, rows in (("train", E2E), ("validation", E2E[:3])):
        Dataset.from_list(rows).to_parquet(tmp_path / "somebody" / "e2e" / f"{name}-00000-of-00001.parquet")
    monkeypatch.setattr(GenerationData, "is_local", False)
    source = str(tmp_path / "somebody" / "e2e")
    sizes = {"batch_size": 70, "shuffle_buffer": 700}
    data = GenerationData("e2e", lm_folder, source, max_length=128, max_new_tokens=20, streaming=True, **sizes)
    data.setup("fit")
    assert len(set(rows_of(islice(data.train_dataloader(), 10)))) == 700
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 0.1}, "holdout is 0.1, but a stream has no known number of rows"),
        ({"train_rows": 5}, "train_rows is 5, but a stream trains from its first row"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0, but must be at least 1"),
        ({"train": [{"mr": "a", "human_reference": "b"}]}, "no column 'meaning_representation'; it has mr"),
        ({"train": [dict(E2E[0], human_reference=" ")]}, "no row of e2e/train .* can be trained on"),
        ({"train": []}, "train.jsonl is empty"),
        ({"source": "/none"}, "no folder or file /none"),
    ],
)
@pytest.mark.filterwarnings("ignore:training rows are left out")
def test_refused(options, message, e2e):
    with pytest.raises(DataError, match=message):
        e2e(**options).setup("fit")


def test_damaged_in_the_middle(e2e):
    data = e2e()
    with open(f"{data.source}/train.jsonl", "a") as file:
        file.write('{"meaning_representation": \n')
    with pytest.raises(DataError, match=r"cannot read e2e/train from .*: .*JSON"):
        list(data.chunks(0))


def test_a_dataloader_of_tensors(e2e):
    data = e2e()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )

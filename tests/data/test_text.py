import json
import logging
import re

import pytest
import torch
from datasets import Dataset
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lte_lightning.data.files import find_split, read_split
from lte_lightning.data.packaged import DataError
from lte_lightning.data.text import BucketBatchSampler, Collate, load_tokenizer, tokenize

LENGTHS = [int(length) for length in torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0))]


def padding(batches):
    padded = sum(len(rows) * max(LENGTHS[row] for row in rows) for rows in batches)
    return 1 - sum(LENGTHS) / padded


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once(shuffle):
    sampler = BucketBatchSampler(LENGTHS, 8, shuffle, seed=0)
    batches = list(sampler)
    assert sorted(row for rows in batches for row in rows) == list(range(1003))
    assert len(sampler) == len(batches) == 126
    assert max(len(rows) for rows in batches) == 8


def test_shuffling_is_decided_by_seed_and_epoch():
    def batches(seed, epoch):
        sampler = BucketBatchSampler(LENGTHS, 8, True, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)
    assert batches(1, 2) != batches(2, 1)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_pass_may_be_begun_in_its_middle(replicas):
    for rank in range(replicas):
        sampler = BucketBatchSampler(LENGTHS, 8, True, 0, replicas, rank)
        sampler.begin(2, 0)
        whole = list(sampler)
        sampler.begin(2, 17)
        assert list(sampler) == whole[17:]
        sampler.set_epoch(2)
        assert list(sampler) == whole


def test_the_epoch_counts_from_the_first_batch_on():
    sampler = BucketBatchSampler(LENGTHS, 8, True, seed=0)
    first = list(sampler)
    waiting = iter(sampler)
    sampler.set_epoch(1)
    assert list(waiting) != first


def test_lightning_reaches_set_epoch():
    sampler = BucketBatchSampler(LENGTHS, 8, True, seed=0)
    _set_sampler_epoch(DataLoader(LENGTHS, batch_sampler=sampler), 5)
    assert sampler.epoch == 5


def test_evaluation_goes_from_long_to_short_and_keeps_the_order_of_equals():
    assert list(BucketBatchSampler([3, 9, 3, 5, 9], 2, False, seed=0)) == [[1, 4], [3, 0], [2]]


def test_buckets_pad_less_than_random_batches():
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(1)).tolist()
    random = padding([order[start : start + 8] for start in range(0, 1003, 8)])
    assert padding(BucketBatchSampler(LENGTHS, 8, False, seed=0)) < 0.02 < random
    assert padding(BucketBatchSampler(LENGTHS, 8, True, seed=0)) < 0.1 < random


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_training_processes_get_equally_many_batches_of_one_epoch(replicas):
    whole = list(BucketBatchSampler(LENGTHS, 8, True, seed=0))
    samplers = [BucketBatchSampler(LENGTHS, 8, True, 0, replicas, rank) for rank in range(replicas)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {-(-126 // replicas)}
    dealt = [rows for turn in zip(*shares, strict=True) for rows in turn]
    assert dealt[:126] == whole
    # What is needed beyond an epoch comes from its beginning.
    assert dealt[126:] == whole[: len(dealt) - 126]


def test_training_wraps_around_more_than_once_when_processes_outnumber_batches():
    shares = [list(BucketBatchSampler([1] * 5, 4, True, 0, 5, rank)) for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5


@pytest.mark.parametrize(("rows", "replicas"), [(1003, 2), (1003, 4), (10, 3), (2, 2)])
def test_evaluation_processes_share_the_rows_without_repetition(rows, replicas):
    samplers = [BucketBatchSampler(LENGTHS[:rows], 8, False, 0, replicas, rank) for rank in range(replicas)]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(rows))
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    # A process without any batch would block the others.
    assert all(shares)


def test_fewer_rows_than_processes_is_an_error():
    with pytest.raises(DataError, match="2 rows are too few for 3 processes"):
        BucketBatchSampler([1, 2], 8, False, 0, 3, 0)


ROWS = {"sentence": ['a "film", good', "None", "NA", "", "tab\tand ünï"], "label": [1, 0, 1, 0, 1]}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = Dataset.from_dict(ROWS)
    file = tmp_path / f"train.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows.to_list()))
    elif suffix == "jsonl":
        rows.to_json(file)
    elif suffix == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_csv(file, sep={"csv": ",", "tsv": "\t"}[suffix])
    assert read_split(tmp_path, "train").to_dict() == ROWS
    assert read_split(file, "train").to_dict() == ROWS


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("sentence,label\ngood,1\n")
    assert read_split(tmp_path, "train")["label"][:] == [1]
    file.write_text("sentence,label\nbad,0\n")
    assert read_split(tmp_path, "train")["label"][:] == [0]


def test_a_missing_label_in_a_csv_stays_a_missing_number(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\ngood,1\nbad,\n")
    assert read_split(tmp_path, "train")["label"][:] == [1, None]


def test_folder_names_are_not_patterns(tmp_path):
    folder = tmp_path / "a [1] *"
    folder.mkdir()
    (folder / "train.csv").write_text("sentence,label\ngood,1\n")
    assert len(read_split(folder, "train")) == 1


def test_missing_files_are_named_with_what_is_accepted(tmp_path):
    with pytest.raises(
        DataError, match=r"no folder or file .*nowhere.*train\{\.jsonl,\.json,\.csv,\.tsv,\.parquet,\.txt\}"
    ):
        read_split(tmp_path / "nowhere", "train")
    assert find_split(tmp_path, "train") is None
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} has no split 'train'; expected train{{.jsonl,")):
        read_split(tmp_path, "train")
    (tmp_path / "train.xml").write_text("good")
    with pytest.raises(DataError, match=r"cannot read .*train\.xml: accepted are \.jsonl"):
        read_split(tmp_path / "train.xml", "train")


def test_two_files_for_a_split_are_ambiguous(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\ngood,1\n")
    (tmp_path / "train.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    with pytest.raises(DataError, match=r"has train\.jsonl and train\.csv: keep one"):
        read_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("train.jsonl", b"", "is empty"),
        (
            "train.jsonl",
            b'null\n{"sentence": "good"}',
            r"cannot be read: line 1 is null, and no row",
        ),  # ended the process
        ("train.json", b"[" * 9000, r"cannot be read: it lies more than 60 levels deep \(line 1\)"),  # so did this
        ("train.jsonl", b'{"label": 1}\n' + b'{"a":' * 99 + b"1" + b"}" * 99, r"more than 60 levels deep \(line 2\)"),
        ("train.csv", b"", "is empty"),
        ("train.jsonl", b"\n\n", "no rows, or is not jsonl"),
        ("train.json", b"[]", "no rows, or is not json"),
        ("train.csv", b"sentence,label\n", "no rows, or is not csv"),
        ("train.jsonl", b'{"sentence": "good"\n', "no rows, or is not jsonl.*JSON parse error"),
        ("train.csv", b"a,b\n1,2\n1,2,3\n", "no rows, or is not csv.*Expected 2 fields"),
        ("train.parquet", b"nonsense", "no rows, or is not parquet"),
    ],
)
def test_empty_and_damaged_files_are_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))} .*{complaint}"):
        read_split(tmp_path, "train")


def test_a_tokenizer_that_cannot_be_loaded_is_named_with_what_was_tried(tmp_path):
    with pytest.raises(DataError, match=r"test_text\.py is a file; name the folder of a model, such as RUN/model"):
        load_tokenizer(__file__)
    with pytest.raises(DataError, match="no tokenizer folder /nowhere"):
        load_tokenizer("/nowhere")
    with pytest.raises(DataError, match=r"cannot load tokenizer 'no-such/model' .*not found as a hub id; offline"):
        load_tokenizer("no-such/model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="has no vocabulary"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="damaged or missing"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_pad_token_is_refused(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    with pytest.raises(DataError, match="no pad token: give it one"):
        load_tokenizer(str(tmp_path / "padless"))


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("one,two,label\nthe cat sat,the dog ran and ran,1\na film,a plot,0\n")
    return read_split(file, "pairs")


def test_tokens_are_those_of_the_tokenizer(tokenizer_folder, pairs):
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = tokenize(pairs, tokenizer, ("one", "two"), max_length=8)
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "attention_mask", "length", "label"}
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS] the cat [SEP] the dog ran [SEP]"
    assert tokenizer.decode(rows[1]["input_ids"]) == "[CLS] a film [SEP] a plot [SEP]"
    assert rows["length"][:] == [8, 7]


def test_tokenising_again_reads_the_cache(tokenizer_folder, pairs, monkeypatch):
    used = load_tokenizer(tokenizer_folder)
    first = tokenize(pairs, used, ("one", "two"), max_length=8)
    # Use leaves padding and truncation behind in the tokenizer.
    used("the cat", padding="max_length", truncation=True, max_length=5)
    fresh = load_tokenizer(tokenizer_folder)

    def no_call(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(fresh), "__call__", no_call)
    for tokenizer in (used, fresh):
        again = tokenize(pairs, tokenizer, ("one", "two"), max_length=8)
        assert again.cache_files == first.cache_files
        assert again.to_dict() == first.to_dict()
    for columns, max_length in ((("one", "two"), 9), (("two", "one"), 8), (("one",), 8)):
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenize(pairs, fresh, columns, max_length)


def test_another_vocabulary_does_not_hit_the_cache(tokenizer_folder, pairs):
    tokenizer = load_tokenizer(tokenizer_folder)
    before = tokenize(pairs, tokenizer, ("one",), max_length=8)
    tokenizer.add_tokens(["cat sat"])
    assert tokenize(pairs, tokenizer, ("one",), max_length=8)["length"][:] != before["length"][:]


def test_another_side_to_cut_does_not_hit_the_cache(tokenizer_folder, pairs):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.decode(tokenize(pairs, tokenizer, ("one",), max_length=3)[0]["input_ids"]) == "[CLS] the [SEP]"
    tokenizer.truncation_side = "left"
    assert tokenizer.decode(tokenize(pairs, tokenizer, ("one",), max_length=3)[0]["input_ids"]) == "[CLS] sat [SEP]"


def test_max_length_must_leave_room_and_keep_the_limit(tokenizer_folder, pairs):
    tokenizer = load_tokenizer(tokenizer_folder)
    with pytest.raises(DataError, match=r"max_length is 4, but 3 special tokens .* need 5"):
        tokenize(pairs, tokenizer, ("one", "two"), max_length=4)
    with pytest.raises(DataError, match="max_length is 65, but the tokenizer's limit is 64"):
        tokenize(pairs, tokenizer, ("one",), max_length=65)
    assert max(tokenize(pairs, tokenizer, ("one", "two"), max_length=5)["length"]) == 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_to_a_multiple_of_8_in_silence(tokenizer_folder, pairs, side, caplog):
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            tokenizer = load_tokenizer(tokenizer_folder)
            tokenizer.padding_side = side
            rows = tokenize(pairs, tokenizer, ("one", "two"), max_length=16)
            batch = Collate(tokenizer, torch.long)([rows[0], rows[1]])
    finally:
        transformers_logging.disable_propagation()
    assert not [record for record in caplog.records if record.name.startswith("transformers")]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == rows["length"][:]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.long
    assert (batch["input_ids"] == tokenizer.pad_token_id).equal(batch["attention_mask"] == 0)
    assert Collate(tokenizer, torch.float32)([rows[1]])["labels"].dtype == torch.float32

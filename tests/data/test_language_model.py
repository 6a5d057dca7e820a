import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_lightning.data import DataError, LanguageModelData
from lte_lightning.data.language_model import count_words

WIKI = " \n = The cat = \n \n The cat eats .\n \n = = Food = = \n \n Fish .\n \n = A dog = \n \n The dog eats .\n"


@pytest.fixture
def lm(make_lm_tokenizer, tmp_path):
    """`lm(train_text, validation_text, **options)`"""

    def make(train=WIKI, validation=WIKI, **options):
        make_lm_tokenizer().save_pretrained(tmp_path / "lm")
        for split, text in (("train", train), ("validation", validation)):
            (tmp_path / f"{split}.txt").write_text(text)
        return LanguageModelData(str(tmp_path / "lm"), **{"source": str(tmp_path), "block_size": 12} | options)

    return make


def predicted(data, loader):
    """The tokens that carry loss, block by block in the order of the text, and the batches' words."""
    blocks = [
        (ids[mask.bool()], labels[mask.bool()], labels[~mask.bool()], words)
        for batch in loader
        for ids, mask, labels, words in zip(*(batch[k] for k in batch), strict=True)
    ]
    for ids, labels, beyond, _ in blocks:
        assert labels.equal(ids)
        assert (beyond == -100).all()
    return blocks


@pytest.mark.parametrize("size", [2, 7, 12, 500])
def test_every_token_is_predicted_once_and_every_word_counted_once(lm, size):
    data = lm(block_size=size)
    data.setup("validate")
    blocks = [data._ready["validation"][0][i] for i in range(len(data._ready["validation"][0]))]
    tokens = np.concatenate([blocks[0]["input_ids"], *(block["input_ids"][1:] for block in blocks[1:])])
    assert [len(block["input_ids"]) for block in blocks] == data._ready["validation"][0].lengths.tolist()
    text = data.tokenizer.decode(tokens.tolist())
    cat, dog = WIKI.removeprefix(" \n").split(" = A dog")
    assert text == f"</s> \n</s>{cat}</s> = A dog{dog}</s>"
    assert sum(block["words"] for block in blocks) == len(WIKI.split())


def test_batches_hide_padding(lm):
    data = lm(block_size=12, eval_batch_size=100)
    data.setup("test")
    blocks = predicted(data, data.test_dataloader())
    assert len({len(ids) for ids, *_ in blocks}) == 2  # the last one is shorter
    assert sum(int(words) for *_, words in blocks) == len(WIKI.split())


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("row", "</s>a cat</s>the dog</s>"),
        ("whole", "</s>a cat\n\nthe dog\n</s>"),
        ("heading", "</s>a cat\n\nthe dog\n</s>"),
    ],
)
def test_documents(lm, documents, expected):
    data = lm(train="a cat\n\nthe dog\n", documents=documents, block_size=5, batch_size=1)
    data.setup("fit")
    packed = data._ready["train"][0]
    tokens = [packed[0]["input_ids"], *(packed[i]["input_ids"][1:] for i in range(1, len(packed)))]
    assert data.tokenizer.decode(np.concatenate(tokens).tolist()) == expected


def test_other_files_with_a_column_of_text(lm, tmp_path):
    data = lm(documents="row")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").unlink()
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a cat", "the dog")))
    data.setup("fit")
    assert data._ready["train"][0].tokens == 1 + sum(
        1 + len(data.tokenizer(text)["input_ids"]) for text in ("a cat", "the dog")
    )


def test_training_batches_are_all_blocks_in_another_order_each_epoch(lm):
    data = lm(block_size=6, batch_size=2)
    data.setup("fit")
    loader = data.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        orders.append([tuple(ids) for batch in loader for ids in batch["input_ids"].tolist()])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@given(st.text(alphabet=" ab\n.é€😀", max_size=40))
def test_words_are_counted_once_whatever_the_tokens_are(text):
    # tokens of one byte: characters of several bytes give several tokens at the same place
    offsets = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert count_words(text, offsets).sum() == len(text.split())


@pytest.mark.parametrize(
    ("text", "message"), [("", "train.txt is empty"), ("\n \n", "has no text")], ids=["empty", "blank"]
)
def test_no_text(lm, text, message):
    with pytest.raises(DataError, match=message):
        lm(train=text).setup("fit")


def test_a_renamed_column(lm, tmp_path):
    data = lm()
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train.jsonl").write_text(json.dumps({"content": "a cat"}) + "\n")
    with pytest.raises(DataError, match=r"no column 'text'.*it has content"):
        data.setup("fit")

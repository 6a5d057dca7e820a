import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import BertTokenizerFast

from lte_lightning.data import GLUE_TASKS, DataError, GlueData
from lte_lightning.data.glue import glue_task

WORDS = "the a film plot is was very not good bad dull bright cat dog sat ran and"


def rows(count=10, columns=("sentence",), label=lambda i: i % 2):
    """Different sentences of different lengths."""
    words = 2 * WORDS.split()
    texts = [" ".join(words[i % 17 : i % 17 + 1 + i % 9]) for i in range(count)]
    return [dict.fromkeys(columns, texts[i]) | {"label": label(i)} for i in range(count)]


@pytest.fixture
def sst2(write_splits, tokenizer_folder):
    """Make an sst2 module of ten training and six validation rows."""

    def make(train=None, validation=None, more=None, **options):
        source = write_splits(train=train or rows(), validation=validation or rows(6), **(more or {}))
        return GlueData(**{"task": "sst2", "tokenizer": tokenizer_folder, "source": source, "max_length": 32} | options)

    return make


def ids(loader):
    """The rows of a loader, in order, as tuples of token ids."""
    return [tuple(i for i in row.tolist() if i) for batch in loader for row in batch["input_ids"]]


def labels(loader):
    return torch.cat([batch["labels"] for batch in loader])


def test_unknown_task_names_the_eight_and_the_nearest():
    with pytest.raises(DataError, match=r"unknown GLUE task 'sst-2' \(do you mean 'sst2'\?\).*cola, .*mnli.*rte"):
        glue_task("sst-2")


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task_gives_batches(task, write_splits, tokenizer_folder):
    glue = GLUE_TASKS[task]
    label = (lambda i: i / 2) if glue.labels == 1 else (lambda i: i % glue.labels)
    content = rows(columns=glue.text_columns, label=label)
    source = write_splits(train=content, **{split: content for split in glue.validation_splits})
    data = GlueData(task, tokenizer_folder, source, max_length=32, batch_size=4)
    assert data.glue == glue
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] in ([4, 4, 2], [4, 2, 4], [2, 4, 4])
    assert {batch["labels"].dtype for batch in batches} == {torch.float32 if task == "stsb" else torch.long}
    assert sorted(labels(batches).tolist()) == sorted(row["label"] for row in content)
    data.setup("test")
    data.setup("predict")
    for loaders in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert (len(loaders) if isinstance(loaders, list) else 1) == len(glue.validation_splits)


def test_mnli_keeps_its_two_validation_sets_apart(write_splits, tokenizer_folder):
    columns = GLUE_TASKS["mnli"].text_columns
    source = write_splits(
        train=rows(columns=columns, label=lambda i: i % 3),
        validation_matched=rows(4, columns, label=lambda i: 0),
        validation_mismatched=rows(5, columns, label=lambda i: 2),
    )
    data = GlueData("mnli", tokenizer_folder, source, max_length=32)
    data.setup("fit")
    matched, mismatched = data.val_dataloader()
    assert labels(matched).tolist() == [0] * 4
    assert labels(mismatched).tolist() == [2] * 5


def test_setup_prepares_only_what_the_stage_needs_and_only_once(sst2):
    data = sst2()
    data.setup("validate")
    assert set(data._ready) == {"validation"}
    data.setup("fit")
    prepared = dict(data._ready)
    data.setup("fit")
    assert all(data._ready[role] is prepared[role] for role in ("train", "validation"))


def test_validation_needs_no_training_file(write_splits, tokenizer_folder):
    data = GlueData("sst2", tokenizer_folder, write_splits(validation=rows(6)), max_length=32)
    data.setup("validate")
    assert len(ids(data.val_dataloader())) == 6
    with pytest.raises(DataError, match=r"has no split 'train' for sst2 \(found: validation\); .*train\.jsonl"):
        data.setup("fit")


def test_holdout_comes_from_training_and_frees_the_official_rows_for_the_test(sst2):
    data = sst2(train=rows(17), validation=rows(5, label=lambda i: 1), holdout=0.25)
    data.setup("fit")
    data.setup("test")
    train, held_out = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert (len(train), len(held_out)) == (13, 4)
    assert len(set(train) | set(held_out)) == 17
    assert labels(data.test_dataloader()).tolist() == [1] * 5


def test_holdout_and_subset_depend_on_the_seed_alone(sst2):
    def parts(**options):
        data = sst2(train=rows(17), **{"holdout": 0.3, "train_rows": 6, "seed": 1} | options)
        data.setup("fit")
        return set(ids(data.train_dataloader())), set(ids(data.val_dataloader()))

    train, held_out = parts()
    assert len(train) == 6
    assert parts() == (train, held_out)
    assert parts(seed=2)[1] != held_out
    more, same = parts(train_rows=9)
    assert train < more
    assert same == held_out


def test_a_labelled_test_split_is_the_test_set_and_an_unlabelled_one_is_not(sst2):
    labelled = sst2(more={"test": rows(3)})
    labelled.setup("test")
    assert len(ids(labelled.test_dataloader())) == 3
    unlabelled = sst2(more={"test": rows(3, label=lambda i: -1)})
    unlabelled.setup("test")
    assert len(ids(unlabelled.test_dataloader())) == 6


def test_training_batches_differ_by_epoch_and_predictions_keep_the_order_of_the_file(sst2):
    data = sst2(batch_size=2, eval_batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    first = ids(loader)
    loader.batch_sampler.sampler.set_epoch(1)
    assert ids(loader) != first
    assert sorted(ids(loader)) == sorted(first)
    data.setup("predict")
    tokenizer = data.tokenizer
    assert ids(data.predict_dataloader()) == [tuple(tokenizer(row["sentence"])["input_ids"]) for row in rows(6)]


class Rows(BoringModel):
    """Looks at no row, but counts them."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def training_step(self, batch, batch_idx):
        self.epochs.append((self.current_epoch, batch["input_ids"].tolist()))
        return super().training_step(torch.ones(1, 32), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(torch.ones(1, 32), batch_idx)

    def predict_step(self, batch, batch_idx):
        return len(batch["labels"])


# Lightning 2.6 calls isinstance with LeafSpec, which torch 2.13 has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_lightning_fits_and_predicts_without_a_warning(sst2, monkeypatch, tmp_path):
    # The advice about workers depends on the machine's cores.
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 7)
    data = sst2(batch_size=2, eval_batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, **quiet)
    model = Rows()
    trainer.fit(model, data)
    first, second = ([rows for epoch, rows in model.epochs if epoch == number] for number in (0, 1))
    assert len(first) == len(second) == 5
    assert first != second
    assert trainer.predict(model, data) == [4, 2]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"task": "sst"}, "unknown GLUE task 'sst'"),
        ({"holdout": -0.1}, r"holdout is -0\.1, .* from 0 to 0\.5"),
        ({"holdout": 0.6}, r"holdout is 0\.6, .* from 0 to 0\.5"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1, but must be at least 1"),
        ({"max_length": 1}, "max_length is 1, but must be at least 2"),
        ({"train_rows": 0}, "train_rows is 0, but must be at least 1"),
    ],
)
def test_settings_are_checked_at_once(options, complaint):
    with pytest.raises(DataError, match=complaint):
        GlueData(**{"task": "sst2", "tokenizer": "unused"} | options)


def bad(row, **cells):
    """Ten good rows, but for one."""
    content = rows()
    content[row] |= cells
    return content


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"train_rows": 11}, r"train_rows is 11, but sst2/train from .* has 10 rows"),
        ({"train_rows": 9, "holdout": 0.2}, "train_rows is 9, .* has 8 rows for training"),
        ({"max_length": 65}, "max_length is 65, but the tokenizer's limit is 64"),
        ({"train": bad(3, sentence=None)}, r"sst2/train from .*, row 3 \(from 0\): sentence is None, not text"),
        ({"train": bad(4, label=2)}, r"row 4 \(from 0\): label is 2, not one of 0 to 1"),
        ({"train": bad(4, label=-1)}, r"row 4 \(from 0\): label is -1, not"),
        ({"train": bad(4, label=0.5)}, r"row 4 \(from 0\): label is 0\.5, not"),
        ({"train": bad(4, label=None)}, r"row 4 \(from 0\): label is None, not"),
        ({"train": bad(4, label="yes")}, r"row 4 \(from 0\): label is 'yes', not"),
        ({"train": rows(label=str)}, r"row 0 \(from 0\): label is '0', not"),
        ({"validation": bad(5, label=7)}, r"sst2/validation from .*, row 5 \(from 0\): label is 7"),
        ({"train": rows(label=lambda i: 1)}, r"the 10 training rows of sst2/train .* have one label only: \[1\]"),
        (
            {"train": [{"Sentence": "a", "label": 1}]},
            r"no column 'sentence' \(do you mean 'Sentence'\?\).* Sentence, label",
        ),
        ({"train": [{"sentence": "a", "labels": 1}]}, r"no column 'label' \(do you mean 'labels'\?\)"),
        ({"source": "./nowhere"}, r"no folder or file \S*nowhere"),
        ({"source": "nowhere/"}, "no folder or file nowhere"),
        ({"source": "no-such/data"}, "no folder 'no-such/data', and cannot load sst2 from the hub"),
        ({"tokenizer": "./nowhere"}, r"no tokenizer folder \./nowhere"),
    ],
)
def test_bad_data_is_refused_by_row_and_value(sst2, options, complaint):
    with pytest.raises(DataError, match=complaint):
        sst2(**options).setup("fit")


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (lambda i: float("nan") if i == 2 else 1.0, r"row 2 \(from 0\): label is .*, not a finite number"),
        (lambda i: "x" if i == 2 else 1.0, r"row 2 \(from 0\): label is 'x', not a finite number"),
        (lambda i: 2.5, r"one label only: \[2\.5\]"),
    ],
)
def test_bad_regression_labels_are_refused(write_splits, tokenizer_folder, label, complaint):
    columns = GLUE_TASKS["stsb"].text_columns
    source = write_splits(train=rows(columns=columns, label=label), validation=rows(columns=columns))
    with pytest.raises(DataError, match=complaint):
        GlueData("stsb", tokenizer_folder, source, max_length=32).setup("fit")


def test_data_is_checked_before_the_tokenizer_is_loaded(sst2):
    with pytest.raises(DataError, match="label is 9"):
        sst2(train=bad(0, label=9), tokenizer="/nowhere").setup("fit")


def test_a_tokenizer_without_token_types_gives_none(sst2, tmp_path, tokenizer_folder):
    tokenizer = BertTokenizerFast.from_pretrained(tokenizer_folder, model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(tmp_path / "typeless")
    data = sst2(tokenizer=str(tmp_path / "typeless"))
    data.setup("fit")
    assert set(next(iter(data.train_dataloader()))) == {"input_ids", "attention_mask", "labels"}

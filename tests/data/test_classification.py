"""Own classification data: any file, any columns, any labels."""

import gzip
import json
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import BertConfig

from lte_lightning.data import ClassificationData, DataError, GlueData
from lte_lightning.data.base import TextData
from lte_lightning.data.classification import task_name
from lte_lightning.data.labels import Labels

STARS = ["awful", "bad", "fine", "good", "great"]
WORDS = "the a film plot is was very not good bad dull bright cat dog sat ran and"  # each of them a token


def texts(count):
    return [" ".join((2 * WORDS.split())[i % 17 : i % 17 + 1 + i % 9]) for i in range(count)]


def table(count=50, label=lambda i: STARS[i % 5]):
    return {"review": texts(count), "stars": [label(i) for i in range(count)]}


def write(path, content):
    """Write columns in the format that the file's name says."""
    rows = Dataset.from_dict(content)
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix, ",")
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_list()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        rows.to_csv(path, sep=separator)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


@pytest.fixture
def own(tmp_path, tokenizer_folder):
    """`own(columns)` or `own(train=..., validation=...)`: a module on one file, or on a folder."""

    def make(one=None, name="reviews.csv", train=None, validation=None, test=None, **options):
        if one is not None:
            source = write(tmp_path / name, one)
        else:
            folder = tmp_path / "reviews"
            folder.mkdir(exist_ok=True)
            splits = {"train": train, "validation": validation, "test": test}
            for split, content in splits.items():
                if content is not None:
                    write(folder / f"{split}.csv", content)
            source = str(folder)
        defaults = {"tokenizer": tokenizer_folder, "source": source, "text": "review", "label": "stars"}
        return ClassificationData(**{**defaults, "max_length": 32} | options)

    return make


def labels(loader):
    return torch.cat([batch["labels"] for batch in loader]).tolist()


def loaders(data):
    return data.train_dataloader(), data.val_dataloader(), data.test_dataloader()


def classes_in(data, loader):
    return Counter(data.labels.names[number] for number in labels(loader))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"])
def test_one_file_of_any_kind_is_cut_into_rows_to_train_and_to_validate_on(own, suffix):
    data = own(table(), f"reviews.{suffix}", batch_size=8)
    data.setup("fit")
    data.setup("test")
    assert data.labels == Labels(tuple(STARS))
    assert [classes_in(data, loader) for loader in loaders(data)] == [dict.fromkeys(STARS, n) for n in (9, 1, 1)]
    assert (data.task, data.metric) == ("reviews", "accuracy")


@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.5])
def test_what_is_held_out_has_each_class_s_share_and_depends_on_the_seed(own, holdout):
    def parts(**options):
        data = own(table(200, lambda i: "rare" if i < 20 else STARS[i % 2]), holdout=holdout, **options)
        return [data.rows(role)[0].to_list() for role in ("train", "validation")]

    train, held_out = parts()
    assert not {json.dumps(row) for row in train} >= {json.dumps(row) for row in held_out} or holdout == 0.5
    for label, count in (("rare", 20), ("awful", 90), ("bad", 90)):
        assert abs(sum(row["stars"] == label for row in held_out) - holdout * count) <= 1, label
    assert len(train) + len(held_out) == 200
    assert parts() == [train, held_out]
    assert parts(seed=1)[1] != held_out


def test_a_subset_for_training_has_all_classes_and_grows(own):
    def train(rows):
        return own(table(100), train_rows=rows).rows("train")[0].to_list()

    assert Counter(row["stars"] for row in train(10)) == dict.fromkeys(STARS, 2)
    assert all(row in train(20) for row in train(10))


@pytest.mark.parametrize(
    ("label", "values"),
    [
        (lambda i: i % 3 + 1, (1, 2, 3)),
        (lambda i: (i % 3) * 10 - 10, (-10, 0, 10)),
        (lambda i: f"00{i % 3}", ("000", "001", "002")),
        (lambda i: ("no", " no", "yes ")[i % 3], ("no", "yes")),
        (lambda i: ("None", "NA", "nan")[i % 3], ("NA", "None", "nan")),
        (lambda i: ("ja", "größe", "日本")[i % 3], ("größe", "ja", "日本")),
    ],
)
def test_labels_are_what_the_file_says(own, label, values):
    data = own(table(30, label))
    data.setup("fit")
    assert data.labels == Labels(values)
    assert set(labels(data.train_dataloader())) == set(range(len(values)))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_whole_numbers_that_a_missing_value_made_floats_and_truth_values(own, suffix):
    data = own(table(30, lambda i: float(i % 3)), f"reviews.{suffix}")
    assert data.labels == Labels((0, 1, 2))
    assert own(table(30, lambda i: i % 2 == 0), f"truth.{suffix}").labels.names == ("False", "True")


def test_pairs_of_columns(own):
    content = table() | {"title": texts(50)[::-1]}
    data = own(content, text=["title", "review"])
    data.setup("fit")
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    expected = data.tokenizer(content["title"][3], content["review"][3])["input_ids"]
    assert batch["input_ids"][3][: len(expected)].tolist() == expected


def test_columns_may_have_the_names_of_what_tokenisers_give(own):
    data = own({"length": texts(20), "input_ids": [i % 2 for i in range(20)]}, text="length", label="input_ids")
    data.setup("fit")
    assert sorted(labels(data.train_dataloader())) == [0] * 9 + [1] * 9


@pytest.mark.parametrize("numbers", [lambda i: i / 4, lambda i: i % 3])
def test_regression(own, numbers):
    data = own(table(20, numbers), regression=True)
    data.setup("fit")
    assert data.labels is None
    assert data.metric == "pearson"
    found = [label for loader in (data.train_dataloader(), data.val_dataloader()) for label in labels(loader)]
    assert sorted(found) == sorted(float(numbers(i)) for i in range(20))


def test_a_folder_with_all_three_files_uses_each(own):
    data = own(train=table(20), validation=table(10), test=table(5))
    data.setup("fit")
    data.setup("test")
    assert [len(labels(loader)) for loader in loaders(data)] == [20, 10, 5]


def test_a_folder_without_validation_rows_holds_some_out_and_keeps_the_test(own):
    data = own(train=table(50), test=table(5))
    data.setup("fit")
    data.setup("test")
    assert [len(labels(loader)) for loader in loaders(data)] == [45, 5, 5]


def test_all_rows_of_a_file_are_predicted_in_order_whether_labelled_or_not(own):
    content = {"review": texts(7), "stars": ["good", "", "bad", "", "good", "?", "bad"]}
    data = own(content, eval_batch_size=3)
    data.setup("predict")
    assert [len(batch["input_ids"]) for batch in data.predict_dataloader()] == [3, 3, 1]
    own({"review": texts(7)}).setup("predict")


def test_all_rows_of_a_file_are_the_test_if_none_is_held_out(own):
    data = own(table(20), holdout=0)
    data.setup("test")
    assert len(labels(data.test_dataloader())) == 20
    with pytest.raises(DataError, match=r"reviews\.csv is one file, and none of its rows are held out.*data\.holdout"):
        data.setup("fit")


# The model's classes


@pytest.fixture
def model_of(tokenizer_folder):
    """Put a configuration beside the tokenizer, as a fine-tuned model of these classes has it."""

    def make(names):
        config = BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(tokenizer_folder)

    return make


def test_the_order_is_that_of_a_model_that_knows_the_classes(own, model_of):
    model_of(["Great", "Good", "Fine", "Bad", "Awful", "Unsure"])
    data = own(table(), holdout=0)
    data.setup("test")
    assert data.labels == Labels(("great", "good", "fine", "bad", "awful", "Unsure"))
    assert classes_in(data, data.test_dataloader()) == dict.fromkeys(STARS, 10)
    unlabelled = own({"review": texts(3)}, "new.csv")
    unlabelled.setup("predict")
    assert unlabelled.labels.names == ("Great", "Good", "Fine", "Bad", "Awful", "Unsure")


@pytest.mark.parametrize("names", [["yes", "no"], ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"]])
def test_the_order_is_that_of_the_data_otherwise(own, model_of, names):
    model_of(names)
    assert own(table()).labels == Labels(tuple(STARS))


def test_glue_in_the_order_of_a_model_that_has_another(write_splits, tokenizer_folder, model_of):
    model_of(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    rows = [{"premise": "a cat", "hypothesis": "a dog", "label": i % 3} for i in range(6)]
    source = write_splits(train=rows, validation_matched=rows, validation_mismatched=rows)
    data = GlueData("mnli", tokenizer_folder, source, max_length=32)
    data.setup("validate")
    assert data.labels == Labels((2, 1, 0), ("contradiction", "neutral", "entailment"))
    assert labels(data.val_dataloader()[0]) == [2, 1, 0, 2, 1, 0]


def test_classes_in_the_order_given(own):
    data = own(table(30, lambda i: i % 3), classes=["2", "0", "1"])
    assert data.labels == Labels((2, 0, 1), ("2", "0", "1"))


def test_a_hub_data_set_s_names_and_its_mark_of_what_is_not_labelled(own, monkeypatch):
    def of_hub(self):
        rows = {"train": [2, 0, 1, 0] * 5, "test": [-1, -1]}
        return {
            name: Dataset.from_dict({"review": texts(len(found)), "stars": found}).cast_column(
                "stars", ClassLabel(names=["bad", "fine", "good"])
            )
            for name, found in rows.items()
        }

    monkeypatch.setattr(TextData, "load_from_hub", of_hub)
    data = own(table(), source="someone/reviews", subset="en")
    data.setup("fit")
    data.setup("test")
    assert (data.labels.values, data.labels.names) == ((0, 1, 2), ("bad", "fine", "good"))
    assert len(labels(data.test_dataloader())) == 2  # of those held out: the test split is not labelled
    assert data.task == "reviews-en"


# What is refused


def changed(row, **cells):
    content = table()
    for column, value in cells.items():
        content[column][row] = value
    return content


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"one": table(), "text": "reviews"}, r"no column 'reviews' \(do you mean 'review'\?\); it has review, stars"),
        ({"one": table(), "label": "star"}, r"no column 'star' \(do you mean 'stars'\?\)"),
        (
            {"one": changed(4, stars="")},
            r"row 4 \(from 0\): stars is None.*1 of 50 rows have no stars: label",
        ),
        ({"one": changed(4, stars="  ")}, r"row 4 \(from 0\): stars is None"),
        (
            {"one": table(20, lambda i: i / 3 if i else float("nan")), "name": "r.parquet", "regression": True},
            r"row 0 \(from 0\): stars is nan, not a finite number; 1 of 20 rows have no stars",
        ),
        ({"one": table(20, lambda i: STARS[i % 2]), "regression": True}, r"stars is 'awful', not a finite number"),
        ({"one": table(20, lambda i: i / 2)}, r"stars has numbers such as 0\.5, .*data\.regression to true"),
        (
            {"one": table(20, lambda i: "good")},
            r"the 18 training rows of reviews/train .*one label only: \['good'\]",
        ),
        (
            {"one": changed(7, stars="superb")},
            r"1 of 6 classes have one row only \('superb'\), so they cannot be in both training",
        ),
        (
            {"one": table(9, lambda i: f"row {i}")},
            r"9 of 9 classes have one row only \('row 0', .*7' and 1 more\)",
        ),
        (
            {"train": table(), "validation": changed(3, stars="goood")},
            r"reviews/validation from .*, row 3 \(from 0\): stars is 'goood', not one of the 5 classes of the training "
            r"rows: awful, bad, fine, good, great \(do you mean 'good'\?\)",
        ),
        ({"one": table(), "classes": STARS[:4]}, r"stars is 'great', not one of the 4 classes given"),
        ({"one": table(20, lambda i: [i]), "name": "r.jsonl"}, r"row 0 .*stars is \[0\]; a row has one class"),
        ({"one": {"review": [1, 2] * 9, "stars": [1, 2] * 9}, "name": "r.jsonl"}, r"row 0 .*: review is 1, not text"),
        (
            {"one": {"review": [None, "a", "b", None] * 5, "stars": ["x", "y"] * 10}, "name": "r.parquet"},
            r"row 0 .*: review is None, not text \(10 of 20 rows have none\): convert",
        ),
        ({"one": {"review": [" ", "\t"] * 9, "stars": [1, 2] * 9}}, r"review is empty in all rows \(18\): fill it"),
        (
            {"train": table(), "validation": None, "holdout": 0},
            r"no split 'validation'.*validation\.jsonl, or \.json",
        ),
        ({"one": table(), "source": "nowhere.csv"}, r"no folder or file nowhere\.csv"),
        ({"one": table(), "label": "review"}, r"text is 'review' and label 'review': name one column"),
        ({"one": table(), "text": []}, r"text is \[\]"),
        ({"one": table(), "regression": True, "classes": STARS}, r"regression has none"),
    ],
)
def test_bad_input_gets_one_clear_line(own, options, complaint):
    with pytest.raises(DataError, match=complaint) as refusal:
        own(**options).setup("fit")
    assert "\n" not in str(refusal.value)


def test_a_misspelt_file_is_told_its_neighbour(own, tmp_path):
    with pytest.raises(DataError, match=r"revews\.csv \(do you mean 'reviews\.csv'\?\)"):
        own(table(), source=str(tmp_path / "revews.csv")).setup("fit")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("review,stars\ncafé,good\n".encode("latin-1"), r"not UTF-8 text: .*iconv -f latin1"),
        (b"review,stars\na,good,late\nb,bad,late\n", "Expected 2 fields in line 2, saw 3"),
        (b"review;stars\na;good;late\nb;bad;late\n", "Expected 2 fields in line 2, saw 3"),
        (b"review,stars\none, two,good\n", "saw 3; a text that contains the separator stands in quotation marks"),
        (b"review,stars\n", "odd.csv has no rows"),
    ],
)
def test_files_that_are_no_csv(own, tmp_path, content, complaint):
    (tmp_path / "odd.csv").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        own(table(), source=str(tmp_path / "odd.csv")).setup("fit")


def test_texts_that_are_empty_are_counted(own):
    with pytest.warns(UserWarning, match=r"reviews/train .*: review is empty in 2 of 50 rows") as told:
        own(table() | {"review": ["", "  ", *texts(48)]}).setup("fit")
    assert all("review is empty in 2" in str(warning.message) for warning in told)


def test_classes_that_differ_in_case_alone_are_told(own):
    with pytest.warns(UserWarning, match=r"upper and lower case alone, and count as several: Good, good;"):
        own(table(20, lambda i: ["good", "Good", "bad"][i % 3])).setup("fit")


def test_two_columns_of_one_name_are_told(own, tmp_path):
    (tmp_path / "twice.csv").write_text("review,stars,review\n" + "a film,good,x\nthe plot,bad,y\n" * 10)
    with pytest.warns(UserWarning, match=r"several columns of the name review: the first of them is read"):
        rows = own(table(), source=str(tmp_path / "twice.csv")).split("train")
    assert rows["review"][:2] == ["a film", "the plot"]


def test_labels_of_several_kinds_are_refused(own, tmp_path):
    rows = [{"review": text, "stars": 1 if i % 2 else "bad"} for i, text in enumerate(texts(20))]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"stars has texts \('bad'\) and others \(1\): write all as texts"):
        own(table(), source=str(tmp_path / "mixed.jsonl")).setup("fit")


def test_numbers_too_long_for_a_number_are_classes(own):
    data = own(table(20, lambda i: ["12345678901234567890", "7"][i % 2]))
    assert data.labels.names == ("12345678901234567890", "7")


def test_a_suffix_may_be_in_capitals_and_a_path_begin_at_home(own, tmp_path, monkeypatch):
    write(tmp_path / "reviews.csv", table()), (tmp_path / "reviews.csv").rename(tmp_path / "Reviews.CSV")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = own(table(), name="other.csv", source="~/Reviews.CSV")
    data.setup("fit")
    assert len(data.labels) == 5
    assert data.task == "Reviews"


def test_files_of_a_folder_that_are_not_read_are_told(own, tmp_path, caplog):
    with caplog.at_level("INFO"):
        data = own(train=table(), validation=table())
        for name in ("dev.csv", "notes.txt", "README.md", ".hidden.csv"):
            (tmp_path / "reviews" / name).write_text("x")
        data.setup("fit")
    assert f"not read in {tmp_path / 'reviews'}: dev.csv; the splits are train, validation, test" in caplog.text
    (tmp_path / "reviews" / "train.csv").unlink()
    with pytest.raises(DataError, match=r"no split 'train' .*; it has dev\.csv: name that instead, or rename it"):
        own(train=None).setup("fit")


def test_the_only_column_of_rows_to_predict_may_have_any_name(own, tmp_path):
    write(tmp_path / "new.csv", {"body": texts(4)})
    data = own(table(), source=str(tmp_path / "new.csv"), classes=STARS)
    data.setup("predict")
    assert len(data._ready["predict"][0]) == 4


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_latin_1_is_refused_in_every_format_of_text(own, tmp_path, suffix):
    line = '{"review": "café", "stars": "good"}\n' if suffix == "jsonl" else "review,stars\ncafé,good\n"
    (tmp_path / f"odd.{suffix}").write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        own(table(), source=str(tmp_path / f"odd.{suffix}")).setup("fit")


def test_spreadsheets_other_separators_marks_and_line_breaks(own, tmp_path):
    rows = [f'{i};"a ""film""; {i}\nbad";{STARS[i % 2]}' for i in range(20)]
    (tmp_path / "excel.csv").write_bytes(("\ufeffid;review;stars\r\n" + "\r\n".join(rows)).encode())
    data = own(table(), source=str(tmp_path / "excel.csv"))
    assert data.split("train")[3] == {"review": 'a "film"; 3\nbad', "stars": "bad"}


def test_a_column_of_digits_is_text_and_a_field_may_be_huge(own):
    content = {"review": ["2001", "the " * 500_000, "007", "1e5"] * 5, "stars": [1, 2] * 10}
    data = own(content)
    data.setup("fit")
    assert data.split("train")["review"][2] == "007"
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 32


@pytest.mark.parametrize(
    ("source", "subset", "name"),
    [
        ("data/My reviews.v2.csv.gz", None, "My-reviews.v2"),
        ("data/reviews/", None, "reviews"),
        ("org/imdb", "plain text", "imdb-plain-text"),
        ("x.jsonl", None, "x"),
    ],
)
def test_the_task_is_named_after_its_source(source, subset, name):
    assert task_name(source, subset) == name

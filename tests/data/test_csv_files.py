"""Files with separators as spreadsheets and people write them, and folders as the hub stores them."""

import gzip

import pytest
from datasets import Dataset

from lte_lightning.data import ClassificationData, DataError, LanguageModelData

LABELS = ("good", "bad")
ROWS = [(f"a film, {number}", LABELS[number % 2]) for number in range(20)]


@pytest.fixture
def own(tmp_path, tokenizer_folder):
    """`own(content)`: a module on a file of that content, or on a source of that name."""

    def make(content=None, source="own.csv", **options):
        if content is not None:
            (tmp_path / source).write_bytes(content if isinstance(content, bytes) else content.encode())
        columns = {"text": "review", "label": "stars"}
        return ClassificationData(tokenizer_folder, str(tmp_path / source), **columns | options)

    return make


def written(separator, rows=ROWS, head="review{}stars"):
    return "\r\n".join([head.format(separator), *(separator.join(row) for row in rows), ""])


@pytest.mark.parametrize("first", ["", "sep=;\r\n", "\ufeffsep=;\r\n", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_names_of_the_columns_show_the_separator_and_commas_in_rows_do_not(own, first, packed):
    content = (first + written(";")).encode()
    data = own(gzip.compress(content) if packed else content, "own.csv.gz" if packed else "own.csv")
    assert data.split("train").to_list() == [{"review": text, "stars": label} for text, label in ROWS]


def test_spaces_after_separators_are_no_part_of_names_and_texts(own):
    content = "stars, review\n" + "".join(f'{label}, "{text}\n""here"""\n' for text, label in ROWS)
    rows = [{"stars": label, "review": f'{text}\n"here"'} for text, label in ROWS]
    assert own(content).split("train").to_list() == rows


def test_decimal_commas_are_numbers_where_numbers_are_predicted(own):
    rows = [("a film", f"{number // 2},{number % 2 * 5}") for number in range(20)]
    assert own(written(";", rows), regression=True).split("train")["stars"][:4] == [0.0, 0.5, 1.0, 1.5]
    assert own(written(";", rows)).classes.values[:2] == ("0,0", "0,5")  # as classes they may be several numbers
    thousands = [("a film", f"{number + 1},000") for number in range(20)]
    with pytest.raises(DataError, match=r"stars is '1,000', not a finite number"):
        own(written(";", thousands), regression=True).split("train")


@pytest.mark.parametrize(("name", "separator"), [("own.csv", ","), ("own.tsv", "\t")])
def test_a_stray_quotation_mark_that_swallows_rows_is_refused(own, name, separator):
    rows = [
        (f'"it {number} was' if number in (3, 12) else f"film {number}", label)
        for number, (_, label) in enumerate(ROWS)
    ]
    with pytest.raises(DataError, match=r"cannot be read: line 5: a quotation mark opens a text .* before line 14"):
        own(written(separator, rows), name).split("train")
    with pytest.raises(DataError, match=r"line 5: .* before line 20, .*unexpected end of data"):
        own(written(separator, [row for row in rows if row[0] != '"it 12 was']), name).split("train")


def test_marks_that_swallow_nothing_are_read(own):
    rows = [('6" of "film"', "good"), ('"a ""film""\n, here"', "bad"), ('"sloppy "film" here"', "good")] * 6
    assert len(own(written(",", rows)).split("train")) == 18


def test_texts_of_tabs_and_line_breaks_are_told(own):
    rows = [
        (f'"film {number}\tgood\nplot"' if number in (3, 12) else "film", label)
        for number, (_, label) in enumerate(ROWS)
    ]
    with pytest.warns(UserWarning, match="has 2 rows whose text between quotation marks has tabs and line breaks"):
        assert len(own(written("\t", rows), "own.tsv").split("train")) == 20


@pytest.fixture
def shards(tmp_path):
    """A folder as the hub stores it, of which each file has ten rows."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 2), ("validation", 1), ("test", 1)):
        for number in range(count):
            rows = [{"review": f"{split} {number} {i}", "stars": LABELS[i % 2]} for i in range(10)]
            name = f"{split}-{number:05}-of-{count:05}.parquet"
            Dataset.from_list(rows).to_parquet(tmp_path / "set" / "data" / name)
    return tmp_path / "set"


def test_a_folder_as_the_hub_stores_it_is_read_by_its_splits(own, shards):
    data = own(source="set")
    assert {name: len(data.split(name)) for name in ("train", "validation", "test")} == {
        "train": 20,
        "validation": 10,
        "test": 10,
    }
    assert data.split("train")["review"][10] == "train 1 0"
    (shards / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"data has 1 of the 2 files of train: add the others"):
        own(source="set").split("train")


def test_running_text_is_not_trained_on_the_test_rows_of_such_a_folder(make_lm_tokenizer, shards, tmp_path):
    make_lm_tokenizer().save_pretrained(tmp_path / "lm")
    data = LanguageModelData(str(tmp_path / "lm"), str(shards), text="review", documents="auto", block_size=16)
    assert {name: len(rows) for name, rows in data.load_splits().items()} == {"train": 20, "validation": 10, "test": 10}
    assert data.documents == "row"

"""Own text: one file or a folder of any, compressed or not, without validation rows."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
from datasets import Dataset

from lte_lightning.data import DataError, LanguageModelData

LINES = [f"the {animal} eats {count} fish" for count in "abcde" for animal in ("cat", "dog", "cow", "owl")]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, lines=LINES, column="text"):
    """Write lines of text, or a table of them, compressed if the name says so."""
    kind = next(suffix for suffix in path.suffixes if suffix not in PACK)
    if kind == ".parquet":
        Dataset.from_dict({column: lines}).to_parquet(path)
        return path
    content = {
        ".jsonl": "".join(json.dumps({column: line}) + "\n" for line in lines),
        ".csv": "\n".join([column, *lines, ""]),
    }.get(kind, "\n".join([*lines, ""]))
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](content.encode()))
    return path


@pytest.fixture
def lm(make_lm_tokenizer, tmp_path):
    make_lm_tokenizer().save_pretrained(tmp_path / "lm")

    def make(source, **options):
        data = LanguageModelData(str(tmp_path / "lm"), str(source), **{"documents": "auto", "block_size": 16} | options)
        data.setup("fit")
        return data

    return make


def text(data, role):
    (packed,) = data._ready[role]
    tokens = [packed[0]["input_ids"], *(packed[i]["input_ids"][1:] for i in range(1, len(packed)))]
    return data.tokenizer.decode(np.concatenate(tokens).tolist())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.xz", "train.txt.bz2"])
def test_a_file_of_text_is_one_document_whose_end_is_held_out(lm, tmp_path, name):
    data = lm(write(tmp_path / name))
    assert data.documents == "whole"
    assert text(data, "train") == "</s>" + "".join(f"{line}\n" for line in LINES[:18]) + "</s>"
    assert text(data, "validation") == "</s>" + "".join(f"{line}\n" for line in LINES[18:]) + "</s>"


def test_blank_lines_at_the_end_are_not_all_that_is_held_out(lm, tmp_path):
    data = lm(write(tmp_path / "a.txt", [*LINES, *[" "] * 30]))
    assert text(data, "train") == "</s>" + "".join(f"{line}\n" for line in LINES[:18]) + "</s>"
    assert text(data, "validation").startswith("</s>" + "".join(f"{line}\n" for line in LINES[18:]))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_line_that_holds_much_of_the_text_is_cut(first, lm, tmp_path):
    """Lines may be paragraphs, chapters, or all there is: a tenth of the lines would be none or most of the text."""
    long = " ".join(LINES)
    whole = [*LINES[:first], long]
    data = lm(write(tmp_path / "a.txt", whole))
    train, validation = (text(data, role).removeprefix("</s>").removesuffix("</s>") for role in ("train", "validation"))
    assert train.removesuffix("\n") + validation == "\n".join(whole) + "\n"
    assert 0.08 <= len(validation) / len(train + validation) <= 0.13
    data = lm(write(tmp_path / "b.txt", [long, *LINES]), holdout=0.5)
    assert 0.4 <= len(text(data, "validation")) / len(" ".join([long, *LINES])) <= 0.6


def test_the_mark_that_windows_writes_first_is_no_text(lm, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join([*LINES, ""]), encoding="utf-8-sig", newline="\r\n")
    assert text(lm(file), "train") == "</s>" + "".join(f"{line}\n" for line in LINES[:18]) + "</s>"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_rows_of_a_table_are_documents_of_which_some_are_held_out(lm, tmp_path, name):
    data = lm(write(tmp_path / name, column="body"), text="body", holdout=0.25)
    assert data.documents == "row"
    roles = ("train", "validation")
    parts = [text(data, role).removeprefix("</s>").removesuffix("</s>").split("</s>") for role in roles]
    assert [len(part) for part in parts] == [15, 5]
    assert sorted(parts[0] + parts[1]) == sorted(LINES)
    assert parts[1] != LINES[15:]


def test_a_folder_without_splits_is_all_its_files(lm, tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    write(folder / "b.md", LINES[4:8])
    write(folder / "a.txt.gz", LINES[:4])
    write(folder / "deep" / "c.jsonl", LINES[8:])
    write(folder / "deep" / ".hidden" / "d.txt", ["nothing"])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    data = lm(folder)
    written = [("</s>" if i in (0, 4) or i >= 8 else "") + f"{line}\n" for i, line in enumerate(LINES)]
    assert text(data, "train") == "".join(written[:18]) + "</s>"
    assert text(data, "validation") == "".join(written[18:]) + "</s>"


def test_files_that_are_not_read_and_rows_that_are_empty_are_told(lm, tmp_path, caplog):
    folder = tmp_path / "notes"
    folder.mkdir()
    write(folder / "a.txt")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "scan.pdf").write_bytes(b"%PDF")
    with caplog.at_level("INFO"):
        assert "eats" in text(lm(folder), "train")
        lm(write(tmp_path / "b.jsonl", [*LINES, " ", ""]), holdout=0.5)
    assert f"not read in {folder}, since empty or of another kind: empty.txt, scan.pdf" in caplog.text
    counts = [
        int(line.partition(" rows of")[0].split()[-3]) for line in caplog.messages if "are empty, and no doc" in line
    ]
    assert sum(counts) == 2


def test_a_folder_with_splits_is_read_as_ever(lm, tmp_path):
    write(tmp_path / "train.txt", LINES[:10])
    write(tmp_path / "validation.md", LINES[10:])
    write(tmp_path / "notes.txt", ["nothing"])
    data = lm(tmp_path, documents="row")
    assert text(data, "train") == "</s>" + "</s>".join(LINES[:10]) + "</s>"
    assert text(data, "validation") == "</s>" + "</s>".join(LINES[10:]) + "</s>"


def test_another_name_of_the_column_does_not_matter_to_files_of_text(lm, tmp_path):
    assert "eats" in text(lm(write(tmp_path / "a.txt"), text="body"), "train")


def test_what_a_folder_needs_is_said_in_the_formats_of_this_task(lm, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl, or \.json, \.csv, \.tsv, \.parquet, \.txt, \.md"):
        lm(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "lines", "options", "complaint"),
    [
        (
            "a.jsonl",
            LINES,
            {"text": "txt"},
            r"no column 'txt' \(do you mean 'text'\?\); it has text; set data\.text",
        ),
        ("a.txt", ["x"], {}, "for train have no text; set another data.holdout"),
        ("a.txt", LINES, {"holdout": 0}, r"a\.txt is one file, and none of its rows are held out"),
        ("a.txt", LINES, {"streaming": True}, r"a\.txt is one file, and a stream's rows cannot be held out"),
    ],
)
def test_what_cannot_be_used_is_refused(lm, tmp_path, name, lines, options, complaint):
    with pytest.raises(DataError, match=complaint):
        lm(write(tmp_path / name, lines), **options)


def test_latin_1_is_refused(lm, tmp_path):
    (tmp_path / "a.txt").write_bytes("café\nthé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        lm(tmp_path / "a.txt")

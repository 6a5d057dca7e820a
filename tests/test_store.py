import threading
import time

import pytest

from lte_lightning.errors import UserError
from lte_lightning.files import exchange, hold_folder, markdown_table, read_json, read_text, write_text
from lte_lightning.store import mlflow_store, reason, shown


def test_one_at_a_time(tmp_path):
    seen = []

    def work(name):
        with hold_folder(tmp_path):
            seen.append(name)
            time.sleep(0.01)
            seen.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen[::2]) == [0, 1, 2, 3]
    assert seen[::2] == seen[1::2]  # whoever came in went out before the next
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_for_others_to_refuse(tmp_path):
    with hold_folder(tmp_path / "nowhere"):
        assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("named", "store"),
    [
        (("http://here:5000", "http://there:5000"), "http://here:5000"),
        (("", None, "sqlite:///there.db"), "sqlite:///{folder}/there.db"),  # an empty variable names nothing
        (("sqlite:////elsewhere/there.db",), "sqlite:////elsewhere/there.db"),
        ((None,), "sqlite:///{folder}/mlflow.db"),
    ],
)
def test_the_first_store_that_is_named_counts(named, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlflow_store(*named) == store.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("http://here:5000", "http://here:5000"),
        ("https://me:SECRET@here/mlflow", "https://***@here/mlflow"),
        ("postgresql://me:a@SECRET/b@here/runs?password=SECRET", "postgresql://***@here/runs?***"),
        ("sqlite:////home/me@work/mlflow.db?timeout=5", "sqlite:////home/me@work/mlflow.db?timeout=5"),
        ("file:///home/me@work/mlruns", "file:///home/me@work/mlruns"),
        ("./me@work", "./me@work"),
    ],
)
def test_what_is_shown_of_an_address(address, kept):
    assert shown(address) == shown(kept) == kept


def test_a_reason_shows_no_password():
    assert reason(OSError("could not\n translate me:SECRET@here")) == "could not translate ***@here"
    assert reason(OSError("failed: http://here/?token=SECRET/api (boom)")) == "failed: http://here/?*** (boom)"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged: Expecting value: line 1 column 1 (char 0); do this"),
        (b"[1, 2]", "is damaged: it holds [1, 2], not a mapping; do this"),
        (b'{"a": "caf\xe9"}', "is damaged: it is not UTF-8 text from byte 10 on; do this"),
        (b"[" * 100_000, "is damaged: it is nested too deep; do this"),
        (b"9" * 400, "is damaged: it holds a number of about 2**1329, not a mapping; do this"),
        (b'{"b": {"a": 1, "a": 2}}', "is damaged: the key 'a' is there twice; do this"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is damaged: Exceeds the limit (4300 digits)"),
    ],
)
def test_json_of_anybody(content, said, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json(tmp_path / "a.json", "do this")
    assert str(raised.value).startswith(f"{tmp_path / 'a.json'} {said}")


def test_json_in_utf8_with_or_without_a_mark(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.json").write_bytes(mark + '{"a": "é"}'.encode())
        assert read_json(tmp_path / "a.json") == {"a": "é"}


def test_a_folder_is_held_for_so_long_at_most(tmp_path):
    with hold_folder(tmp_path) as held:
        assert held
        with hold_folder(tmp_path, seconds=0.2) as again:
            assert not again
    with hold_folder(tmp_path, seconds=0.2) as held:
        assert held
    with hold_folder(tmp_path / "nowhere") as held:
        assert not held


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/none/a\.txt: No such file or directory$"):
        write_text(tmp_path / "none" / "a.txt", "")


def test_a_text_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError) as raised:
        read_text(tmp_path)
    assert str(raised.value) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("at_once", [True, False])
def test_two_folders_exchange_their_names(at_once, tmp_path, monkeypatch):
    if not at_once:  # a file system that has no such step
        monkeypatch.setattr("lte_lightning.files._swap", lambda *_: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    exchange(tmp_path / "new", tmp_path / "old")
    assert [(tmp_path / name / "which").read_text() for name in ("new", "old")] == ["old", "new"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_table_in_markdown():
    assert markdown_table(["a", "b"], [["1", "2|3"]]) == "| a | b |\n|---|---|\n| 1 | 2/3 |\n"

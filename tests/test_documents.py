import pytest
import yaml

from lte_lightning.documents import DocumentError, LimitError, check_rows, read_yaml


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"a": [1, {"b": []}]}\n'] * 100,
        [b"[\n", *[b'{"a": "x"},\n'] * 500, b"]\n"],
        [b'{"a": "' + b"[{" * 500 + b'"}\n'],  # brackets in a text are none
        [b'{"a": "' + b'\\"[' * 500 + b'"}\n'] * 3,
        [b'{"a": "null"}\n', b"{\n", b"null\n"],
        [b"[" + b'{"a": 1},' * 500 + b"{}]"],
        [b"[" * 60 + b"]" * 60],
    ],
)
def test_rows_that_are_sound(lines):
    check_rows(lines)


def test_rows_that_end_a_reader():
    with pytest.raises(LimitError, match=r"more than 60 levels deep \(line 2\)"):
        check_rows([b"{}\n", b"[" * 61 + b"]" * 61])
    with pytest.raises(LimitError, match=r"more than 60 levels deep \(line 61\)"):
        check_rows([b"[\n"] * 100)
    with pytest.raises(DocumentError, match="line 2 is null, and no row"):
        check_rows([b"{}\n", b"  null\n"])


@pytest.mark.parametrize(
    "value",
    [
        "!!bool maybe",
        "!!int ''",
        "!!float ''",
        "!!timestamp soon",
        "!!int many",
        "2001-13-01",
        "1" * 5000,
        "0x_",
        "!!set [1]",
    ],
)
def test_a_value_that_is_none_of_its_kind(value):
    """PyYAML raises a KeyError, an IndexError and an AttributeError for the first ones."""
    with pytest.raises(yaml.YAMLError):
        read_yaml(f"a: {value}")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("&key a: 1\n*key : 2\n", "a", 2),
        ("x: &key a\n*key : 1\na: 2\n", "a", 3),
    ],
)
def test_a_key_that_an_alias_repeats(text, key, line):
    """YAML takes the last."""
    with pytest.raises(DocumentError, match=rf"the key '{key}' is there twice \(line {line}\)"):
        read_yaml(text)


def test_keys_that_are_there_once():
    text = "y: &part {b: 1}\nz: &word a\nall: {<<: [*part, {c: 2}], *word : *word, b: 3}\n"
    assert read_yaml(text)["all"] == {"a": "a", "b": 3, "c": 2}

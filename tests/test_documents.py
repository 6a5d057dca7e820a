import pytest
import yaml

from lte_lightning.documents import (
    DEEPEST,
    MOST_CHARACTERS,
    MOST_NODES,
    DocumentError,
    LimitError,
    check_rows,
    check_yaml,
    read_yaml,
)


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


def nested(levels):
    return "[" * levels + "]" * levels


WORDS = MOST_NODES // 10
ALIASES = f"a: &a [{'x,' * (WORDS - 1)}]\n"  # a mapping, its key, and a list of WORDS parts with it


@pytest.mark.parametrize(
    ("most", "one_more", "said"),
    [
        (" " * MOST_CHARACTERS, " " * (MOST_CHARACTERS + 1), "it has 4000001 characters, more than 4000000"),
        (nested(DEEPEST - 1), "\n" + nested(DEEPEST), r"it lies 60 levels deep \(line 2\); nest less"),
        (f"[{'x,' * (MOST_NODES - 2)}]", f"[{'x,' * (MOST_NODES - 1)}]", r"more than 100000 parts \(line 1\)"),
        (
            f"{ALIASES}b: [{'*a,' * 8}{'x,' * (WORDS - 5)}]",
            f"{ALIASES}b: [{'*a,' * 8}{'x,' * (WORDS - 4)}]",
            "with its aliases followed it has more than 100000 parts",
        ),
        (
            f"a: &a x\nb: [{'*a,' * WORDS}{'x,' * (9 * WORDS - 6)}]",
            f"a: &a x\nb: [{'*a,' * WORDS}{'x,' * (9 * WORDS - 5)}]",
            "more than 100000 parts",
        ),
        ("a: &a x\nb: [*a]", "a: &a [*a]", r"\*a stands within what it stands for \(line 1\)"),
        ("a: {b: 1}\nb: [b, b]\nc: b", "a: {b: 1}\nb: 1\nc: 2\nb: 1", r"the key 'b' is there twice \(line 4\)"),
        ("a: x", 'a: "\\0"', r"'\\x00' holds a NUL character \(line 1\)"),
    ],
)
def test_the_most_that_is_let_pass(most, one_more, said):
    check_yaml(most)
    with pytest.raises(DocumentError, match=said):
        check_yaml(one_more)


@pytest.mark.parametrize("text", ["{a: [}", "a: b: c"])
def test_what_is_no_yaml_is_named_with_its_line(text):
    with pytest.raises(DocumentError, match="line 1, column"):
        check_yaml(text)


def test_rows_on_the_limits():
    check_rows([b"[\n"] * DEEPEST + [b"]\n"] * DEEPEST)
    check_rows([b"[]]]\n", *[b"[\n"] * DEEPEST])  # what closes more than was open
    check_rows([b'{"a": [\n', b"null]}\n"])
    check_rows([b"[]\n", b"{}\n", b"[" + b"[]," * DEEPEST + b"1]\n"] * 3)
    check_rows([b"[{\n", b"[]}]\n"] * DEEPEST)
    with pytest.raises(LimitError, match=r"\(line 63\)"):
        check_rows([b"[\n"] * DEEPEST + [b"]\n", b"[\n", b"[\n"])
    with pytest.raises(LimitError, match=r"\(line 62\)"):
        check_rows([b"[\n", b"[]\n"] + [b"{\n"] * DEEPEST)
    with pytest.raises(LimitError, match=r"\(line 2\)"):
        check_rows([b"[" * 30 + b"\n", b"[" * 31 + b"]" * 31])

import pytest

from lte_lightning.documents import DocumentError, LimitError, check_rows


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

"""The values of options, read and checked."""

from collections.abc import Sequence
from pathlib import Path

from lte_lightning.errors import UserError, meant
from lte_lightning.files import require_place

PICTURES = (".png", ".svg", ".pdf")
SPARSITIES = "0,0.25,0.5,0.65,0.8,0.9,0.95"


def check_files(csv: Path | None, picture: Path | None) -> None:
    """Checks where figures and their picture are to be written.

    Raises:
        UserError: If a file cannot be written there, or its name is of another kind.
    """
    for path in (csv, picture):
        if path:
            require_place(path)
    if picture and picture.suffix not in PICTURES:
        raise UserError(f"--picture is {picture}; its name must end in {', '.join(PICTURES)}")
    if csv and csv.suffix in PICTURES:
        raise UserError(f"--csv is {csv}, a picture's name; the picture is --picture's")


def one_of(text: str, known: Sequence[str], what: str) -> list[str]:
    """Returns the words of an option, each once, all of them known.

    Raises:
        UserError: If that is not what is there.
    """
    values = dict.fromkeys(text.split(","))
    for value in values:
        if value not in known:
            raise UserError(f"unknown {what} {value!r}{meant(value, known)}; there are {', '.join(known)}")
    return list(values)


def numbers(text: str) -> list[float]:
    """Returns shares.

    Raises:
        UserError: If that is not what is there.
    """
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"--sparsity is {text!r}; it takes shares between 0 and 1 with commas, like {SPARSITIES}")
    return values


def read_tokens(text: str) -> tuple[int, int]:
    """Returns sequences, and tokens of each.

    Raises:
        UserError: If that is not what is there.
    """
    words = text.split("x")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(words) > 2:
        raise UserError(f"--tokens is {text!r}; it takes a number like 4, or sequences x tokens like 32x128")
    return int(words[0]), int(words[1]) if len(words) == 2 else 1

"""Reads and checks the values of options."""

from collections.abc import Sequence
from pathlib import Path

from lte_lightning.errors import UserError, meant
from lte_lightning.files import require_place

PICTURES = (".png", ".svg", ".pdf")
SPARSITIES = "0,0.25,0.5,0.65,0.8,0.9,0.95"


def check_files(csv: Path | None, picture: Path | None) -> None:
    """Checks the paths of the CSV file and the picture.

    Raises:
        UserError: If a file cannot be written there, or has the wrong suffix.
    """
    for path in (csv, picture):
        if path:
            require_place(path)
    if picture and picture.suffix not in PICTURES:
        raise UserError(f"--picture is {picture}; its name must end in {', '.join(PICTURES)}")
    if csv and csv.suffix in PICTURES:
        raise UserError(f"--csv is {csv}, which is the name of a picture; use --picture for that")


def one_of(text: str, known: Sequence[str], what: str) -> list[str]:
    """Returns the comma-separated values of an option, without repetitions.

    Raises:
        UserError: If a value is unknown.
    """
    values = dict.fromkeys(text.split(","))
    for value in values:
        if value not in known:
            raise UserError(f"unknown {what} {value!r}{meant(value, known)}; there are {', '.join(known)}")
    return list(values)


def numbers(text: str) -> list[float]:
    """Returns the comma-separated shares of ``--sparsity``.

    Raises:
        UserError: If a value is not a share.
    """
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"--sparsity is {text!r}; it takes shares from 0 to 1 with commas, like {SPARSITIES}")
    return values


def read_tokens(text: str) -> tuple[int, int]:
    """Returns the number of sequences and the tokens of each, from ``4`` or ``32x128``.

    Raises:
        UserError: If the text has neither form.
    """
    words = text.split("x")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(words) > 2:
        raise UserError(f"--tokens is {text!r}; it takes a number like 4, or SEQUENCESxTOKENS like 32x128")
    return int(words[0]), int(words[1]) if len(words) == 2 else 1

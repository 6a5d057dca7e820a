"""The one kind of error that is meant for the user, and the hint that a misspelt name deserves."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """An error that the user can put right; its message says what was wrong and what to do.

    The command line prints the message alone and ends with exit code 1; from Python it is a `ValueError`.
    """


def meant(name: object, known: Iterable[str], form: str = " (do you mean {!r}?)") -> str:
    """Returns a remark that names the known word nearest to an unknown one, or nothing if none is near.

    Args:
        name: The unknown one.
        known: The words there are; upper and lower case count as the same.
        form: The remark, with a place for the word.
    """
    folded = {word.casefold(): word for word in known}
    nearest = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return form.format(folded[nearest[0]]) if nearest else ""


def meant_path(path: str | os.PathLike[str]) -> str:
    """Returns a remark that names the file or folder nearest to one that is not there, or nothing if none is near."""
    parent = Path(path).absolute().parent
    try:
        return meant(Path(path).name, sorted(os.listdir(parent)))
    except OSError:
        return ""

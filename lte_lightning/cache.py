"""The user's cache folder, for compiled kernels and help texts."""

import hashlib
import os
from pathlib import Path


def cache_place() -> Path | None:
    """Returns ``$XDG_CACHE_HOME/lte-lightning``, by default in ``~/.cache``; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lte-lightning"
    except RuntimeError:  # no HOME, and nobody of this number in the list of users
        return None


def cache_folder() -> Path | None:
    """Returns the folder after making it; None where nothing can be written."""
    folder = cache_place()
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def content_digest(content: bytes) -> str:
    """Returns the digest of its content that the name of a cached library ends with."""
    return hashlib.sha256(content).hexdigest()[:16]

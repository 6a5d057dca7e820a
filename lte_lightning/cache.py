"""The folder of what this package makes once and keeps for the user: compiled kernels, help texts."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Returns ``$XDG_CACHE_HOME/lte-lightning``, by default in ``~/.cache``; None where nothing can be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lte-lightning"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter without a home
        return None
    return folder if os.access(folder, os.W_OK) else None

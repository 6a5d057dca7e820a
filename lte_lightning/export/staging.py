"""Write a file or a folder whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.files import require_place, writing


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or a folder, and moves it to its place at the end of the ``with`` block.

    Args:
        path: The place, where nothing may exist.

    Raises:
        UserError: If something exists there, or the place cannot be written to.
    """
    require_free(path)
    with writing(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield folder / path.name
            (folder / path.name).rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def require_free(path: Path) -> None:
    """Refuses a place that is taken, or whose folder does not exist."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another place, or remove it")
    require_place(path)

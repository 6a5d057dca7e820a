"""What is written is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.files import require_place


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields where to write a file or a folder, which is moved to its place at the end of the ``with`` block.

    Args:
        path: Its place; nothing may be there.

    Raises:
        UserError: If something is there already, or cannot be written.
    """
    require_free(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield folder / path.name
        (folder / path.name).rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_free(path: Path) -> None:
    """Refuses a place where something is, or whose folder is not there."""
    if path.exists():
        raise UserError(f"{path} is there already; choose another place, or remove it")
    require_place(path)

"""Files that are written whole or not at all, and locks on folders."""

import ctypes
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import is_zipfile

from lte_lightning.errors import UserError, meant_path

SHARDED = ("meta.pt", ".metadata")
"""Files that every checkpoint folder has; the second name is torch's."""


@contextmanager
def whole_file(path: Path, mode: str = "w", **how: Any) -> Iterator[IO[Any]]:
    """Opens a file to be written, which takes its name only once all of it is on the disk.

    It is written beside its target, since a rename is whole within one file system alone. Whatever happens, a file of
    that name that was there before stays until then.

    Args:
        path: The file; what is left of it where the process is killed is ``<name>.tmp``.
        mode: ``w`` or ``wb``.
        **how: Passed to ``open``.

    Raises:
        UserError: If it cannot be written, on a full disk for one.
    """
    path = Path(os.path.realpath(path))  # what a link points to, not the link
    if mode == "w":
        how = {"encoding": "utf-8"} | how
    if path.exists() and not path.is_file():  # /dev/stdout
        with path.open(mode, **how) as file:
            yield file
        return
    staging = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with staging.open(mode, **how) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or after a power cut the new name may be of an empty file
            staging.replace(path)
            sync(path.parent)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what Python and libraries raise where they cannot write, on a full disk for one, into one line.

    Args:
        path: The file or folder that the block writes. It is as it was if the block fails.

    Raises:
        UserError: If the block could not write.
    """
    try:
        yield
    except Exception as error:
        if (why := _unwritten(error)) is None:
            raise
        before = "; the file before it is kept" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {why}{before}") from error


def _unwritten(error: Exception) -> str | None:
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch cannot end its file then
        error = error.__context__
    if isinstance(error, OSError):
        return error.strerror or str(error)
    io = re.search(r"I/O error: (.*?)(?: \(os error \d+\))?$", str(error))
    return io[1] if io and type(error).__name__ == "SafetensorError" else None  # its import would cost every command


def require_place(path: Path) -> None:
    """Checks that a file can be written, before the work whose result it is to hold.

    Raises:
        UserError: If its folder is not there, it is a folder itself, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to{meant_path(path.parent)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written")


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; a stroke within a cell becomes ``/``."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]]) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Returns the content of a text file.

    Raises:
        UserError: If it cannot be read, or is no text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text from byte {error.start} on: convert it; from Latin-1, for example, by iconv -f "
            "latin1 -t utf-8 OLD > NEW"
        ) from error
    except OSError as error:
        near = meant_path(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read {path}: {error.strerror or error}{near}") from error


def read_json(path: Path, way_out: str = "", **how: Any) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds. The file may come from anybody.

    Args:
        path: The file.
        way_out: What to do about one that cannot be read; the error's last words.
        **how: Passed to ``json.loads``.

    Raises:
        UserError: If it is damaged, or holds no mapping.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once, **how)
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8 text from byte {error.start} on"
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = str(error)
    else:
        if isinstance(content, dict):
            return content
        why = f"it holds {abridged(content)}, not a mapping"
    raise UserError(f"{path} is damaged: {why}{way_out and f'; {way_out}'}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):  # JSON would take the last
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {abridged(counts.most_common(1)[0][0])} is there twice")
    return mapping


def abridged(value: object, most: int = 60) -> str:
    """Returns a value as messages may show it, on one line and cut off."""
    if isinstance(value, int) and abs(value) > 10**18:  # one of 5,000 digits cannot be written at all
        return f"a number of about 2**{value.bit_length()}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def is_checkpoint(path: Path) -> bool:
    """Says whether a path is a checkpoint: a file, or the folder that several processes write together."""
    return all((path / name).is_file() for name in SHARDED) or is_zipfile(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Waits until the files of a folder, their contents and their names, are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def exchange(new: Path, old: Path) -> None:
    """Gives a folder another one's name; what had the name before is then at the new one's, if there was any.

    On Linux that is one step, where the file system can do it. Else a kill between two renames leaves the folder that
    was there before beside the new one, named like that with ``.old``.
    """
    if not old.exists():
        new.rename(old)
    elif not _swap(new, old):
        aside = new.with_name(f"{new.name}.old")
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise
        aside.rename(new)
    sync(old.parent)


def _swap(one: Path, other: Path) -> bool:
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or an old one
        return False
    here, at_once = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = swap(here, os.fsencode(one), here, os.fsencode(other), at_once)
    return done == 0


@contextmanager
def hold_folder(folder: Path, seconds: float | None = None) -> Iterator[bool]:
    """Waits until no other process of this machine is in such a block of the same folder; nothing is left behind.

    A folder that is not there, or a system without such locks (Windows), is let pass: what is done in the block says
    what is wrong.

    Args:
        folder: The folder.
        seconds: The longest that it waits; without a limit by default.

    Yields:
        Whether the folder is held.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        deadline = None if seconds is None else time.monotonic() + seconds
        yield _lock(descriptor, fcntl, deadline)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, fcntl: Any, deadline: float | None) -> bool:
    if deadline is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:  # a network's file system that has no locks
            return False

"""Find, build and load the compiled kernels of the CPU backend.

A library is named ``cpu_ffn-<instruction set>-<sources>-<compiler>-<content>.so``, where the last three are digests. If
the content does not match the name, the file was cut or overwritten. Loading it could end the process, so it is never
loaded. The compiler's digest is that of ``CXX``, so that a library outlives the compiler that made it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from lte_lightning.cache import cache_folder, cache_place, content_digest
from lte_lightning.errors import UserError
from lte_lightning.files import hold_folder, whole_file
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.kernels.cpu.pages import keep_pages

SOURCES = Path(__file__).parent
PLACE = "LTE_KERNELS"  # the variable that names a folder of libraries which were built ahead of time
SHIPPED = SOURCES / "built"  # such a folder within a wheel
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
COMPILER_SECONDS = 300  # time limit of the compiler, which takes about 10 on an idle core
KEPT = 8  # libraries to keep in the user's cache: several instruction sets and versions of this package

logger = logging.getLogger("lte_lightning")


class BuildError(UserError):
    """The kernels cannot be compiled here."""


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels for this machine, and compiles them if there are none; None if that fails.

    The search covers the folder that ``LTE_KERNELS`` names, the package, and the user's cache
    (``$XDG_CACHE_HOME/lte-lightning``, by default in ``~/.cache``). The cache keeps what is compiled. If the search and
    the compiler both fail, existing kernels of a lesser instruction set are loaded.
    """
    wanted = instruction_set()
    keep_pages()
    try:
        return build(wanted)
    except BuildError as error:
        lesser = list(instruction_sets())[: list(instruction_sets()).index(wanted)]
        for instructions in reversed(lesser):
            if (loaded := find(instructions)) is not None:
                logger.warning(f"the cpu backend runs kernels for {instructions}, not for {wanted}: {error}")
                return loaded
        warnings.warn(
            f"the cpu backend runs without its compiled kernels ({error}), as torch operations over views of the "
            "experts: a small part of the speed-up remains, and none for many tokens. Install a C++ compiler (g++ or "
            f"clang++), name one in CXX, or name a folder that `lte build-kernels --out` filled in {PLACE}",
            stacklevel=2,
        )
        return None


def build(instructions: str) -> ctypes.CDLL:
    """Loads the kernels for one of `instruction_sets`, and compiles them if there are none.

    If several processes come at the same time, one compiles and the others wait. A library that cannot be kept serves
    this process alone.

    Raises:
        BuildError: If there are no kernels, and they cannot be compiled.
    """
    if (loaded := find(instructions, by=_compiler_digest())) is not None:
        return loaded
    logger.warning(
        f"the CPU kernels for {instructions} are compiled now, which takes about ten seconds and is done once (`lte "
        "build-kernels` does it beforehand)"
    )
    try:
        folder = cache_folder()
        if folder is None:
            return _compile_and_load(instructions, None)
        with hold_folder(folder, seconds=2 * COMPILER_SECONDS):
            if (loaded := find(instructions, by=_compiler_digest())) is not None:  # another process was faster
                return loaded
            loaded = _compile_and_load(instructions, folder)
            _prune(folder)
            return loaded
    except BuildError:
        if (loaded := find(instructions)) is not None:  # built while CXX named another compiler
            return loaded
        raise


def build_into(folder: Path, instructions: str) -> Path:
    """Compiles the kernels for one of `instruction_sets` into a folder, whole or not at all; returns the library.

    Raises:
        BuildError: If there is no compiler, it fails, or it takes more than five minutes.
        UserError: If the folder cannot be written to.
    """
    with _scratch() as scratch:
        return _keep(_compile(instructions, scratch), folder)


def _compile_and_load(instructions: str, folder: Path | None) -> ctypes.CDLL:
    """Compiles the kernels, keeps them in the folder if possible, and loads them."""
    with _scratch() as scratch:  # a loaded library no longer needs its file
        path = _compile(instructions, scratch)
        if folder is not None:
            try:
                path = _keep(path, folder)
            except UserError as error:
                logger.warning(f"the CPU kernels are compiled for this process alone: {error}")
        loaded = _load(path)
    if loaded is None:
        raise BuildError(f"the library that was compiled for {instructions} cannot be loaded from {path.parent}")
    return loaded


def _keep(path: Path, folder: Path) -> Path:
    with whole_file(folder / path.name, "wb") as file:
        file.write(path.read_bytes())
    return folder / path.name


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        scratch = tempfile.TemporaryDirectory(prefix="lte-lightning-")
    except OSError as error:
        raise BuildError(f"there is no place for temporary files: {error.strerror or error}") from error
    with scratch as folder:
        yield Path(folder)


def find(instructions: str, by: str = "*") -> ctypes.CDLL | None:
    """Loads an existing library for one of `instruction_sets`; returns None if there is none.

    Args:
        instructions: The instruction set.
        by: Digest of the compiler that must have built a library of the user's cache. Any compiler may have built a
            library ahead of time.
    """
    for path in _candidates(instructions, by):
        if (loaded := _load(path)) is not None:
            return loaded
    return None


def _candidates(instructions: str, by: str) -> Iterator[Path]:
    named, kept = os.environ.get(PLACE), cache_place()
    for folder, compiler in ((named and Path(named), "*"), (SHIPPED, "*"), (kept, by)):
        if folder:
            with suppress(OSError):  # the folder may be unreadable
                yield from sorted(folder.absolute().glob(f"{_stem(instructions)}-{compiler}-*.so"))


def _load(path: Path) -> ctypes.CDLL | None:
    """Loads a library if its content matches its name and it runs with this system's C library; else returns None."""
    try:
        if path.stem.rpartition("-")[2] != content_digest(path.read_bytes()):
            logger.warning(f"{path} is damaged and not loaded")
            if path.parent == cache_place():
                path.unlink()
            return None
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None
    with suppress(OSError):  # `_prune` reads when it was last used
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return loaded


def _prune(folder: Path) -> None:
    """Removes all but the last used libraries, and leftovers of killed compilations. The caller holds the folder."""
    built = sorted(folder.glob("cpu_ffn-*.so"), key=lambda path: path.stat().st_atime_ns, reverse=True)
    for path in (*built[KEPT:], *folder.glob("cpu_ffn-*.so.tmp")):
        with suppress(OSError):
            path.unlink()


def _compile(instructions: str, scratch: Path) -> Path:
    out = scratch / "library"
    content = compile_library(instructions, sorted(map(str, SOURCES.glob("*.cpp"))), out)
    return out.rename(scratch / f"{_stem(instructions)}-{_compiler_digest()}-{content_digest(content)}.so")


def compile_library(instructions: str, sources: Sequence[str], out: Path, options: Sequence[str] = ()) -> bytes:
    """Compiles sources into a library and returns its content. Raises `BuildError` if that fails."""
    compiler = _find_compiler()
    # -ldl comes after the sources, because older C libraries keep dlsym there.
    output = _run([*compiler, *_flags(instructions), *sources, *options, "-o", str(out), "-pthread", "-ldl"])
    try:
        return out.read_bytes()
    except OSError as error:
        raise BuildError(f"{shlex.join(compiler)} made no library{output and f': {output}'}") from error


def _run(command: list[str]) -> str:
    """Runs a compiler and returns its output. Kills it with all that it started if it takes too long."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    with process:
        try:
            output = process.communicate(timeout=COMPILER_SECONDS)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {COMPILER_SECONDS} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise BuildError(f"{command[0]} failed: {_cause(output.splitlines()) or f'exit code {process.returncode}'}")
    return output[:200]


def _cause(lines: Iterable[str]) -> str:
    """Returns the line of a compiler's output that names the error."""
    lines = [line.strip() for line in lines if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")[:300]


def _find_compiler() -> list[str]:
    words = _words()
    candidates = words[:1] or ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler {words[0]}, which CXX names" if words else "no C++ compiler found")
    return [compiler, *words[1:]]


def _words() -> list[str]:
    """Returns the words of ``CXX``, which may be "ccache g++"; none by default."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CXX is no command: {text!r} ({error})") from error


def _compiler_digest() -> str:
    words = os.environ.get("CXX", "").split()
    return content_digest(repr(words).encode()) if words else "default"


def _stem(instructions: str) -> str:
    """Returns the beginning of every library's name for these sources and flags."""
    digest = hashlib.sha256(repr((_flags(instructions), platform.machine())).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(f"{source.name} ".encode() + source.read_bytes())
    return f"cpu_ffn-{instructions}-{digest.hexdigest()[:16]}"


def _flags(instructions: str) -> tuple[str, ...]:
    return (*FLAGS, *instruction_sets()[instructions])

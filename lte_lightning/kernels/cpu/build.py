"""The compiled kernels of the CPU backend: where a library is found, how it is built, and what is done without one.

A library's name says what it is: ``cpu_ffn-<instruction set>-<sources>-<compiler>-<content>.so``, the last three as
digests. A file whose content is not what its name says was cut or overwritten, and loading it could end the process: it
is never loaded. The compiler is known by what ``CXX`` says, so that a library outlives the compiler that made it.
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

import torch

from lte_lightning.cache import cache_folder, cache_place
from lte_lightning.errors import UserError
from lte_lightning.files import hold_folder, whole_file
from lte_lightning.kernels.cpu.processor import cpu_flags

SOURCES = Path(__file__).parent
PLACE = "LTE_KERNELS"  # names a folder of libraries that were built ahead of time
SHIPPED = SOURCES / "built"  # the same within a wheel
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VNNI = (*AVX512, "-mavx512vnni")
# Each runs where a later one does
INSTRUCTION_SETS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": (*VNNI, "-mavx512bf16"),
}
COMPILER_SECONDS = 300  # the longest that a compiler may take; about 10 on an idle core
KEPT = 8  # libraries in the user's cache: of several instruction sets, and of other versions of this package

logger = logging.getLogger("lte_lightning")


class BuildError(UserError):
    """The kernels cannot be compiled here."""


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels for this machine, after compiling them if none are found; None if that fails.

    They are looked for in the folder that ``LTE_KERNELS`` names, in the package, and in the user's cache
    (``$XDG_CACHE_HOME/lte-lightning``, by default in ``~/.cache``), where they are kept. If they are nowhere and cannot
    be compiled, those of a lesser instruction set are taken.
    """
    wanted = instruction_set()
    try:
        return build(wanted)
    except BuildError as error:
        lesser = list(INSTRUCTION_SETS)[: list(INSTRUCTION_SETS).index(wanted)]
        for instructions in reversed(lesser):
            if (found := find(instructions)) is not None:
                logger.warning(f"the cpu backend runs kernels for {instructions}, not for {wanted}: {error}")
                return found
        warnings.warn(
            f"the cpu backend runs without its compiled kernels ({error}), as torch operations over views of the "
            "experts: a small part of the speed-up remains, and none for many tokens. Install a C++ compiler (g++ or "
            f"clang++), name one in CXX, or name a folder that `lte build-kernels --out` filled in {PLACE}",
            stacklevel=2,
        )
        return None


def build(instructions: str) -> ctypes.CDLL:
    """Loads the kernels for one of `INSTRUCTION_SETS`, after compiling them if none are found.

    Of processes that come at the same time one compiles, and the others wait. What cannot be kept is for this process.

    Raises:
        BuildError: If they must be compiled, and cannot be.
    """
    if (found := find(instructions, by=_compiler_digest())) is not None:
        return found
    logger.warning(
        f"the CPU kernels for {instructions} are compiled now, which takes about ten seconds and is done once (`lte "
        "build-kernels` does it beforehand)"
    )
    try:
        folder = cache_folder()
        if folder is None:
            return _compile_and_load(instructions, None)
        with hold_folder(folder, seconds=2 * COMPILER_SECONDS):
            if (found := find(instructions, by=_compiler_digest())) is not None:  # another process was faster
                return found
            found = _compile_and_load(instructions, folder)
            _prune(folder)
            return found
    except BuildError:
        if (found := find(instructions)) is not None:  # by a compiler that CXX named then
            return found
        raise


def build_into(folder: Path, instructions: str) -> Path:
    """Compiles the kernels for one of `INSTRUCTION_SETS`, and returns the library, which is whole or not there.

    Raises:
        BuildError: If there is no compiler, it fails, or it takes more than five minutes.
        UserError: If the folder cannot be written to.
    """
    with _scratch() as scratch:
        return _keep(_compile(instructions, scratch), folder)


def _compile_and_load(instructions: str, folder: Path | None) -> ctypes.CDLL:
    """Compiles the kernels, keeps them in a folder if they can be kept there, and loads them."""
    with _scratch() as scratch:  # what is loaded needs its name no more
        path = _compile(instructions, scratch)
        if folder is not None:
            try:
                path = _keep(path, folder)
            except UserError as error:
                logger.warning(f"the CPU kernels are compiled for this process alone: {error}")
        found = _load(path)
    if found is None:
        raise BuildError(f"the library that was compiled for {instructions} cannot be loaded from {path.parent}")
    return found


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
    """Returns a library that was built before for one of `INSTRUCTION_SETS`, loaded; None if there is none.

    Args:
        instructions: Its instruction set.
        by: Digest of the compiler that those of the user's cache must be built by. Those that were built ahead of time
            may be built by any.
    """
    for path in _candidates(instructions, by):
        if (found := _load(path)) is not None:
            return found
    return None


def _candidates(instructions: str, by: str) -> Iterator[Path]:
    named, kept = os.environ.get(PLACE), cache_place()
    for folder, compiler in ((named and Path(named), "*"), (SHIPPED, "*"), (kept, by)):
        if folder:
            with suppress(OSError):  # a folder that may not be read
                yield from sorted(folder.absolute().glob(f"{_stem(instructions)}-{compiler}-*.so"))


def _load(path: Path) -> ctypes.CDLL | None:
    """Loads a library, if its content is what its name says and it runs with this system's C library."""
    try:
        if path.stem.rpartition("-")[2] != _digest(path.read_bytes()):
            logger.warning(f"{path} is damaged and not loaded")
            if path.parent == cache_place():
                path.unlink()
            return None
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    with suppress(OSError):  # when it was last used, for `_prune`
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return found


def _prune(folder: Path) -> None:
    """Removes all but the libraries used last, and what killed compilations left; the folder is held."""
    built = sorted(folder.glob("cpu_ffn-*.so"), key=lambda path: path.stat().st_atime_ns, reverse=True)
    for path in (*built[KEPT:], *folder.glob("cpu_ffn-*.so.tmp")):
        with suppress(OSError):
            path.unlink()


def _compile(instructions: str, scratch: Path) -> Path:
    out = scratch / "library"
    content = compile_library(instructions, sorted(map(str, SOURCES.glob("*.cpp"))), out)
    return out.rename(scratch / f"{_stem(instructions)}-{_compiler_digest()}-{_digest(content)}.so")


def compile_library(instructions: str, sources: Sequence[str], out: Path, options: Sequence[str] = ()) -> bytes:
    """Compiles sources into a library, and returns its content; raises `BuildError` if that fails."""
    compiler = _find_compiler()
    # -ldl behind the sources: older C libraries keep dlsym there
    said = _run([*compiler, *_flags(instructions), *sources, *options, "-o", str(out), "-pthread", "-ldl"])
    try:
        return out.read_bytes()
    except OSError as error:
        raise BuildError(f"{shlex.join(compiler)} made no library{said and f': {said}'}") from error


def _run(command: list[str]) -> str:
    """Runs a compiler, which is ended with all that it started if it takes too long; returns what it said."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    with process:
        try:
            said = process.communicate(timeout=COMPILER_SECONDS)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {COMPILER_SECONDS} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise BuildError(f"{command[0]} failed: {_cause(said.splitlines()) or f'exit code {process.returncode}'}")
    return said[:200]


def _cause(lines: Iterable[str]) -> str:
    """Returns the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in lines if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")[:300]


def _find_compiler() -> list[str]:
    wanted = _words()
    candidates = wanted[:1] or ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise BuildError(f"no C++ compiler {wanted[0]}, which CXX names" if wanted else "no C++ compiler found")
    return [found, *wanted[1:]]


def _words() -> list[str]:
    """Returns the words of ``CXX``, which may be "ccache g++"; none by default."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CXX is no command: {text!r} ({error})") from error


def _compiler_digest() -> str:
    words = os.environ.get("CXX", "").split()
    return _digest(repr(words).encode()) if words else "default"


def _stem(instructions: str) -> str:
    """Returns what the names of all libraries of these sources and flags begin with."""
    found = hashlib.sha256(repr((_flags(instructions), platform.machine())).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        found.update(f"{source.name} ".encode() + source.read_bytes())
    return f"cpu_ffn-{instructions}-{found.hexdigest()[:16]}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _flags(instructions: str) -> tuple[str, ...]:
    return (*FLAGS, *INSTRUCTION_SETS[instructions])


def instruction_set() -> str:
    """Returns the best of `INSTRUCTION_SETS` that this machine has (torch's ATEN_CPU_CAPABILITY can lower it)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "portable"
    level = torch.backends.cpu.get_cpu_capability()
    if level == "AVX512":
        return next((name for name in ("avx512_bf16", "avx512_vnni") if name in cpu_flags()), "avx512")
    return "avx2" if level == "AVX2" else "portable"

"""Write a model whose selected experts OpenVINO runs, with a library that is compiled at its first use."""

import hashlib
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel

from lte_lightning.cache import cache_folder, content_digest
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.export.graph import EXPORTERS, Graph, needs, save_openvino, to_program, write_rest
from lte_lightning.export.staging import staged
from lte_lightning.files import hold_folder, whole_file
from lte_lightning.kernels.cpu.build import (
    COMPILER_SECONDS,
    FLAGS,
    SOURCES,
    compile_library,
)
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.quiet import without_remarks

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = "lte_openvino.so"
KEPT = 4  # libraries to keep in the cache, for several versions
logger = logging.getLogger("lte_lightning")


def write_openvino_sparse(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Writes ``openvino_model.xml`` and ``.bin`` that run selected experts alone, and the library that computes them.

    The library, ``lte_openvino.so``, is for this kind of processor and this version of OpenVINO. Call
    ``openvino.Core().add_extension(path)`` before you read the model. The library computes experts in bfloat16.

    Args:
        model: A converted model in float32, in mode hard.
        source: The folder or hub id of its tokenizer.
        folder: The folder to write.

    Raises:
        UserError: If OpenVINO or a compiler is missing, or the kernels cannot take the model's experts.
    """
    if (modes := {ffn.mode for ffn in expert_ffns(model).values()}) != {"hard"}:
        raise UserError(
            f"the model is in mode {', '.join(sorted(modes))}, in which every expert runs; export it with --to openvino"
        )
    graph, program = Graph(model), to_program(model, "cpu")
    operators = [node for node in program.graph.nodes if str(node.target) == "lte_lightning.cpu_ffn.default"]
    if len(operators) != len(expert_ffns(model)):
        raise UserError(
            "the kernels do not take these experts (another activation, or a selector that needs more than the input); "
            "export the model with --to openvino, which computes all of them"
        )
    with staged(folder) as staging, without_remarks(*EXPORTERS):
        staging.mkdir()
        library = extension_library(staging / LIBRARY)
        save_openvino(graph, program, staging, library)
        write_rest(model, source, staging)


def extension_library(out: Path) -> Path:
    """Writes the library for this machine and the installed OpenVINO. Compiles it unless it is cached.

    Args:
        out: The file to write.

    Returns:
        The file that was written.

    Raises:
        UserError: If OpenVINO is missing, has no headers, or there is no C++ compiler that takes them.
    """
    with needs("OpenVINO"):
        import openvino
    root = Path(openvino.__file__).parent
    libraries = [next(iter(sorted((root / "libs").glob(name))), None) for name in ("libopenvino.so*", "libtbb.so*")]
    if platform.system() != "Linux" or None in libraries or not (root / "include" / "tbb").is_dir():
        raise UserError(
            "sparse models run in OpenVINO on Linux, with the headers and libraries of OpenVINO's own wheel (pip "
            f"install openvino); {root} lacks these"
        )
    instructions = instruction_set()
    options = [f"-I{root / 'include'}", f"-I{SOURCES}", *map(str, libraries)]
    known = hashlib.sha256(repr((FLAGS, instruction_sets()[instructions], openvino.__version__)).encode())
    for source in (SOURCE, *sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))):
        known.update(source.read_bytes())
    stem = f"openvino-{instructions}-{known.hexdigest()[:16]}"
    folder = cache_folder()
    if folder is None:
        _compile(instructions, options, out)
        return out
    with hold_folder(folder, seconds=2 * COMPILER_SECONDS):
        content = _cached(folder, stem)
        if content is None:
            content = _compile(instructions, options, out)
            with whole_file(folder / f"{stem}-{content_digest(content)}.so", "wb") as file:
                file.write(content)
            for old in sorted(folder.glob("openvino-*.so"), key=os.path.getmtime)[:-KEPT]:
                with suppress(OSError):
                    old.unlink()
        else:
            out.write_bytes(content)
    return out


def _compile(instructions: str, options: list[str], out: Path) -> bytes:
    logger.warning(
        f"OpenVINO's extension for {instructions} is compiled now, which takes about half a minute and is done once"
    )
    return compile_library(instructions, [str(SOURCE)], out, options)


def _cached(folder: Path, stem: str) -> bytes | None:
    """Returns a cached library whose content matches its name; None if there is none."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        content = path.read_bytes()
        if path.stem.rpartition("-")[2] == content_digest(content):
            return content
        logger.warning(f"{path} is damaged and not loaded")
        path.unlink()
    return None

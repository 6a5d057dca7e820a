"""The ``cpu`` backend: ffn.cpp, compiled on first use, as the torch operator ``lte_lightning::cpu_ffn``."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from lte_lightning.cache import cache_folder
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.views import run_views

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WAYS = ("any", "few", "many")


class Costs(NamedTuple):
    """Nanoseconds per weight of an expert: once for the expert, and for each token that runs it."""

    few: tuple[float, float]
    many: tuple[float, float]
    dense: tuple[float, float]


# Where torch's own product of all experts may be faster: by type and instruction set, measured on one core of Zen 5
# with oneDNN (LLaMA-2-7B's shape). What is not here is always computed sparsely: torch was slower at every sparsity.
# With tile instructions (AMX) torch's product is taken for six times as fast, which is an estimate.
COSTS = {
    (torch.bfloat16, "avx512_bf16"): Costs(few=(0.050, 0.030), many=(0.22, 0.0066), dense=(0.20, 0.0051)),
    (torch.bfloat16, "amx"): Costs(few=(0.050, 0.030), many=(0.22, 0.0066), dense=(0.20, 0.0009)),
}
SOURCES = ("ffn.cpp", "few.h", "many.h", "pairs.h", "vector.h")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTION_SETS = {"portable": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}


def run_cpu(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output on the CPU, with torch's number of threads; float32 sums, no gradient.

    The weights are read in place, those of an expert that no token selected not at all. Where the machine has no C++
    compiler the same is done by torch over views of the experts, more slowly, and a warning says so.

    Args:
        x_ND: Input of N tokens, float32, bfloat16 or float16.
        mask_NE: True where a token runs an expert.
        weights: The FFN, of the same type.

    Returns:
        The output [N, D], in the type of ``x_ND``.
    """
    w = weights
    return torch.ops.lte_lightning.cpu_ffn(
        x_ND, mask_NE, w.up_ESD, w.down_ESD, w.activation, w.gate_ESD, w.up_bias_ES, w.gate_bias_ES, w.down_bias_D
    )


torch.library.define(
    "lte_lightning::cpu_ffn",
    "(Tensor x, Tensor mask, Tensor up, Tensor down, str activation, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias) -> Tensor",
)


@torch.library.impl("lte_lightning::cpu_ffn", "CPU")
def _cpu_ffn(
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    up_ESD: torch.Tensor,
    down_ESD: torch.Tensor,
    activation: str,
    gate_ESD: torch.Tensor | None,
    up_bias_ES: torch.Tensor | None,
    gate_bias_ES: torch.Tensor | None,
    down_bias_D: torch.Tensor | None,
) -> torch.Tensor:
    weights = ExpertWeights(up_ESD, down_ESD, activation, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D)
    lib = library()
    if lib is None:
        return run_views(x_ND, mask_NE, weights)
    if dense_is_faster(mask_NE, up_ESD.dtype):
        return run_dense_mask(x_ND, mask_NE, weights)
    return run_compiled(lib, x_ND, mask_NE, weights)


def dense_is_faster(mask_NE: torch.Tensor, dtype: torch.dtype) -> bool:
    """Says whether so much is selected that computing all of it and masking is faster.

    Never where some expert is needed by no token: its weights must not be read.
    """
    tokens = len(mask_NE)
    costs = COSTS.get((dtype, "amx" if has_amx() else instruction_set()))
    if costs is None or tokens < 4:
        return False
    count_E = mask_NE.sum(dim=0)
    if not count_E.all():
        return False
    per_expert = count_E.float().mean().item()
    few, many = (expert + token * per_expert for expert, token in (costs.few, costs.many))
    return costs.dense[0] + costs.dense[1] * tokens < min(few, many)


@torch.library.register_fake("lte_lightning::cpu_ffn")
def _fake(x_ND, mask_NE, up_ESD, down_ESD, activation, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format)


def run_compiled(
    lib: ctypes.CDLL, x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights, way: str = "any"
) -> torch.Tensor:
    """Calls the kernels: those for few or for many tokens per expert, or whatever suits."""
    if x_ND.dtype not in DTYPES or x_ND.dtype != weights.up_ESD.dtype:
        raise ValueError(
            f"the input is {x_ND.dtype} and the weights are {weights.up_ESD.dtype}; the cpu kernels want both of one "
            f"type, of {', '.join(map(str, DTYPES))}"
        )
    w = weights
    tensors = (x_ND, w.up_ESD, w.gate_ESD, w.down_ESD, w.up_bias_ES, w.gate_bias_ES, w.down_bias_D)
    kept = [None if tensor is None else tensor.contiguous() for tensor in (*tensors, mask_NE)]  # no copy if it is
    out_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    *addresses, mask_at, out_at = [None if tensor is None else tensor.data_ptr() for tensor in (*kept, out_ND)]
    E, S, D = w.up_ESD.shape
    status = lib.lte_ffn(
        DTYPES[x_ND.dtype],
        (ctypes.c_int64 * 4)(len(x_ND), D, E, S),
        list(ACTIVATIONS).index(w.activation),
        torch.get_num_threads(),
        WAYS.index(way),
        ctypes.c_void_p(mask_at),
        (ctypes.c_void_p * 8)(*addresses, out_at),
    )
    if status:
        raise MemoryError("the cpu kernel found no memory for its buffers")
    return out_ND


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels, after compiling them if no process of this user has yet; None without a compiler.

    They are kept in ``$XDG_CACHE_HOME/lte-lightning`` (by default ``~/.cache``), one file per source, compiler and
    instruction set.
    """
    try:
        return build(instruction_set())
    except (OSError, subprocess.SubprocessError) as error:
        why = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            why = f"{error.cmd[0]} failed:\n{error.stderr.strip()[:2000]}"
        warnings.warn(
            f"the cpu backend runs without its compiled kernels ({why}), as torch operations over views of the "
            "experts: a small part of the speed-up remains, and none for many tokens. Install a C++ compiler (g++ or "
            "clang++), or name one in CXX",
            stacklevel=2,
        )
        return None


@cache
def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def has_amx() -> bool:
    """Says whether torch multiplies bfloat16 in tiles here."""
    return "amx_bf16" in _cpu_flags() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def instruction_set() -> str:
    """Returns the best of `INSTRUCTION_SETS` that this machine has (torch's ATEN_CPU_CAPABILITY can lower it)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "portable"
    level = torch.backends.cpu.get_cpu_capability()
    if level == "AVX512":
        return "avx512_bf16" if "avx512_bf16" in _cpu_flags() else "avx512"
    return "avx2" if level == "AVX2" else "portable"


def build(instructions: str) -> ctypes.CDLL:
    """Compiles the kernels for one of `INSTRUCTION_SETS`, or finds them compiled, and loads them.

    Raises:
        FileNotFoundError: If there is no compiler.
        subprocess.CalledProcessError: If it fails.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))  # it may be "ccache g++"
    found = [shutil.which(name) for name in (wanted[:1] or ("c++", "g++", "clang++"))]
    if not any(found):
        raise FileNotFoundError(f"no C++ compiler {wanted[0]}, which CXX names" if wanted else "no C++ compiler found")
    compiler = [next(filter(None, found)), *wanted[1:]]
    flags = (*FLAGS, *INSTRUCTION_SETS[instructions])
    folder = Path(__file__).parent
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, version, flags, platform.machine())).encode())
    for source in SOURCES:
        digest.update((folder / source).read_bytes())
    kept = cache_folder() or Path(tempfile.mkdtemp(prefix="lte-lightning-"))  # the latter for this process only
    path = kept / f"cpu_ffn-{instructions}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        handle, fresh = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        try:
            # -ldl behind the source: older C libraries keep dlsym there
            command = [*compiler, *flags, str(folder / SOURCES[0]), "-o", fresh, "-pthread", "-ldl"]
            subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(fresh, path)  # whole or not at all: another process may be compiling the same
        finally:
            Path(fresh).unlink(missing_ok=True)
    lib = ctypes.CDLL(str(path))
    lib.lte_ffn.restype = ctypes.c_int
    return lib

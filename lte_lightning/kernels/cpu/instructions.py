"""The instruction sets that the CPU kernels are compiled for."""

import platform

import torch

from lte_lightning.kernels.cpu.processor import cpu_flags

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VNNI = (*AVX512, "-mavx512vnni")
X86 = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": (*VNNI, "-mavx512bf16"),
}
# NEON belongs to every 64-bit ARM processor, so "portable" has it there.
ARM = {
    "portable": (),
    "neon_dotprod": ("-march=armv8.2-a+dotprod",),
    "neon_i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
}


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Returns the compiler's options for each instruction set of this kind of processor.

    A machine that runs a set also runs every earlier set.
    """
    return ARM if _is_arm() else X86


def instruction_set() -> str:
    """Returns the best of `instruction_sets` that this machine has; on x86 torch's ATEN_CPU_CAPABILITY can lower it."""
    if _is_arm():
        flags = cpu_flags()
        return "neon_i8mm" if {"i8mm", "asimddp"} <= flags else "neon_dotprod" if "asimddp" in flags else "portable"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "portable"
    level = torch.backends.cpu.get_cpu_capability()
    if level == "AVX512":
        return next((name for name in ("avx512_bf16", "avx512_vnni") if name in cpu_flags()), "avx512")
    return "avx2" if level == "AVX2" else "portable"


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")

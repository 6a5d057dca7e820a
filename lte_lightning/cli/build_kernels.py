"""``lte build-kernels``: the CPU kernels, compiled ahead of their first use."""

from pathlib import Path

from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: The kernels cannot be compiled, or the folder cannot be written to.
    """
    call(build_kernels, "lte build-kernels", args)


def build_kernels(out: str | None = None, instructions: str = "auto") -> None:
    """Compiles the CPU kernels, which are otherwise compiled when they are first used.

    Without a folder it also measures which way to compute an FFN is faster here, with torch's number of threads.

    Args:
        out: Folder for the libraries, for images that have no compiler: LTE_KERNELS=FOLDER finds them there. By default
            the user's cache.
        instructions: Instruction sets to compile for, with commas between: portable, avx2, avx512,
            avx512_vnni, avx512_bf16 (on ARM portable, neon_dotprod, neon_i8mm), or all of them. By default the best
            that this machine has.
    """
    import torch

    from lte_lightning.cache import cache_folder
    from lte_lightning.errors import UserError, meant
    from lte_lightning.kernels.cpu.build import PLACE, build_into
    from lte_lightning.kernels.cpu.ffn import measure_costs
    from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets

    known = list(instruction_sets())
    names = {"auto": [instruction_set()], "all": known}.get(instructions) or instructions.split(",")
    for name in names:
        if name not in known:
            raise UserError(
                f"there is no instruction set {name!r}{meant(name, known)}; there are {', '.join(known)}, or all"
            )
    folder = Path(out) if out else cache_folder()
    if folder is None:
        raise UserError("the user's cache cannot be written to; name another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; name another folder with --out") from error
    for name in names:
        path = build_into(folder, name)
        print(f"{path}  {path.stat().st_size // 1024} KiB")
    if out:
        print(f"{PLACE}={folder.absolute()} finds them")
    elif instruction_set() in names and (measured := measure_costs()):
        print(f"measured with {torch.get_num_threads()} threads: which way is faster in {', '.join(measured)}")

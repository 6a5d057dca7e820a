"""Measures everything on a GPU in one run of some minutes: ceilings, numerics, tiles, FFNs, whole decoders.

    python benchmarks/gpu/measure.py --out gpu            # everything: gpu/*.csv, gpu/log.txt, a short table last
    python benchmarks/gpu/measure.py --parts ffn --out gpu
    python benchmarks/gpu/measure.py --dry-run            # lists what would run; needs no GPU

The script needs torch, triton, transformers and this repository. The numerics also need pytest and hypothesis. If a
part fails, the script reports it and runs the others.
"""

import argparse
import csv
import datetime
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402

Rows = list[dict[str, Any]]


def ceilings() -> Rows:
    """Upper limits of speed: copy bandwidth (bytes read plus written) and bfloat16 products on random data."""
    from timing import median_ms

    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    read_ms = median_ms(lambda: source.view(torch.int32).sum())
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_ms = median_ms(lambda: a @ b)
    return [
        {"what": "copy TB/s", "value": 2 * source.nbytes / copy_ms / 1e9},
        {"what": "read TB/s (torch.sum)", "value": source.nbytes / read_ms / 1e9},
        {"what": "bfloat16 TFLOP/s, 8192", "value": 2 * 8192**3 / product_ms / 1e9},
    ]


def numerics() -> Rows:
    """The tests of all Triton kernels against the oracle, on the device, in parallel if pytest-xdist is installed."""
    from importlib.util import find_spec

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=",
        "tests/kernels",
    ]
    command += ["-n", "8"] if find_spec("xdist") else []
    from tiles import start_compiling

    # Both wait for compilers, and no measurement runs meanwhile.
    compiling = start_compiling(7)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-4000:], done.stderr[-1000:])
    for process in compiling:
        process.wait()
    return [{"what": "numerics", "value": done.returncode, "says": done.stdout.strip().splitlines()[-1]}]


SANITIZED = """
import torch
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.ffn import run_triton
from lte_lightning.kernels.triton.router import route_triton
E, S, D = 12, 32, 256
w = ExpertWeights(*(torch.randn(E, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)), "silu",
                  torch.randn(E, S, D, device="cuda", dtype=torch.bfloat16))
for N in (1, 7, 200):
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    router, threshold = torch.randn(E, D, device="cuda", dtype=torch.bfloat16), torch.tensor(0.5, device="cuda")
    mask = route_triton(x, router, None, threshold)
    assert run_triton(x, mask, w).isfinite().all()
torch.cuda.synchronize()
"""


def sanitizer() -> Rows:
    """compute-sanitizer's memcheck and racecheck on one token, seven and two hundred."""
    rows = []
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run(
            ["compute-sanitizer", "--tool", tool, sys.executable, "-c", SANITIZED],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=150,
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        rows.append({"what": tool, "value": done.returncode, "says": lines[-1] if lines else ""})
    return rows


def tiles() -> Rows:
    """Every tile of the written lists, for one, few and many tokens; the tables should hold the fastest."""
    from tiles import tune

    return tune()


def ffn() -> Rows:
    """One LLaMA-2-7B FFN against the dense one, one token to 4,096, 0 to 90 % sparsity."""
    from ffn import measure

    return [row for tokens in (1, 4, 16, 64, 512, 4096) for row in measure("llama2-7b", torch.bfloat16, tokens)]


def ffn_tuned() -> Rows:
    """The same FFN with the fastest tiles of this run."""
    return ffn()


def profile() -> Rows:
    """The time of each kernel."""
    from ffn import profile

    return profile()


def decoder() -> Rows:
    """Whole LLaMA-2-7B-shaped decoders, dense and sparse: a static cache, one CUDA graph per token; and eager."""
    from decoder import measure

    return measure()


PARTS: dict[str, Callable[[], Rows]] = {
    part.__name__: part for part in (numerics, ceilings, ffn, tiles, ffn_tuned, profile, decoder, sanitizer)
}


def machine() -> dict[str, str]:
    """Returns the machine and versions behind the results."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for the figures (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="import every part, say what would run, and stop")
    args = parser.parse_args()
    parts = args.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.dry_run:
        from decoder import rehearse
        from tiles import LISTS

        rehearse()
        print(f"tiles: {sum(len(rows) for *_, rows in LISTS)} to compile and to time")
        print("\n".join(f"{part}: {PARTS[part].__doc__}" for part in parts))
        return
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --dry-run says what would be measured on one")
    args.out.mkdir(parents=True, exist_ok=True)
    about, failed = machine(), []
    print(about)
    for part in parts:
        start = time.monotonic()
        try:
            rows = PARTS[part]()
        except Exception:
            traceback.print_exc()
            failed.append(part)
            continue
        finally:
            print(f"-- {part}: {time.monotonic() - start:.0f} s", flush=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(args.out / f"{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*names, *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)
        for row in rows:
            print(
                "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()),
                flush=True,
            )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""The command: arguments, table, CSV, picture, MLflow."""

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lte_lightning.bench.measure import Figure

HELP = "measure what skipping experts saves: latency against the dense model, sparsity by sparsity"
PICTURES = (".png", ".svg", ".pdf")
SPARSITIES = "0,0.25,0.5,0.65,0.8,0.9,0.95"


def make_parser(prog: str = "lte bench") -> argparse.ArgumentParser:
    """Returns the command's parser."""
    parser = argparse.ArgumentParser(prog, description=f"{HELP}.", allow_abbrev=False)
    add = parser.add_argument
    shapes = "llama2-7b, smollm2-135m or roberta-base with random weights, or a converted model's folder or hub id"
    tokens = "tokens per call, several with commas: 4 decodes for 4 sequences, 32x128 is 32 sequences of 128 tokens"
    scopes = (
        "ffn (one FFN block), model (all measured layers, both stacks of an encoder-decoder; never the head, so that a "
        "folder compares with a named shape)"
    )
    threads = "torch's threads, bound to as many cores while it measures; default: torch's own choice"
    dtypes = "f32, bf16, f16, mixed (f32 weights, bf16 autocast), several with commas"
    default = " (default: %(default)s)"
    add("--shape", default="llama2-7b", help=shapes + default)
    add("--scope", default="ffn,model", help=scopes + default)
    add("--dtype", default="f32,bf16", help=dtypes + default)
    add("--tokens", default="1", help=tokens + default)
    add("--sparsity", default=SPARSITIES, help="shares of experts that each token skips" + default)
    add("--backend", default="auto", help="auto, dense-mask, reference, cpu or triton" + default)
    add("--device", default="auto", help="cpu, cuda or cuda:1; auto takes a CUDA device where there is one" + default)
    add("--threads", type=int, help=threads)
    add("--layers", type=int, help="layers of a named shape; default: FFN weights of eight times the last cache")
    add("--repeats", type=int, default=11, help="rounds, after one that is not counted" + default)
    add("--clock", default="wall", help="wall, or cpu: time of one thread, for machines that are never quiet" + default)
    add("--rivals", action="store_true", help="measure the obvious alternatives besides, in scope ffn")
    add("--csv", type=Path, help="write one row per figure here")
    add("--picture", type=Path, help="draw speed-up against sparsity here; default: beside the CSV")
    add("--mlflow", metavar="EXPERIMENT", help="log the CSV and the picture there (MLFLOW_TRACKING_URI, or mlflow.db)")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; what the user can put right is said in one message."""
    from lte_lightning.errors import UserError

    options = make_parser().parse_args(args)
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> "list[Figure]":
    """Measures, prints and writes.

    Raises:
        UserError: If an option's value is not one.
    """
    import torch

    from lte_lightning.bench.machine import CLOCKS, find_device, pinned
    from lte_lightning.bench.measure import measure
    from lte_lightning.bench.rivals import make_rivals
    from lte_lightning.bench.subject import DTYPES, make_subject
    from lte_lightning.errors import UserError
    from lte_lightning.kernels.dispatch import BACKENDS

    scopes = _one_of(options.scope, ("ffn", "model"), "scope")
    dtypes = _one_of(options.dtype, tuple(DTYPES), "dtype")
    _one_of(options.backend, BACKENDS, "backend")
    _one_of(options.clock, tuple(CLOCKS), "clock")
    sparsities = sorted(_numbers(options.sparsity))
    calls = [_tokens(text) for text in options.tokens.split(",")]
    for name in ("threads", "layers", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    for path in (options.csv, options.picture):
        if path and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} to")
        if path and path.is_dir():
            raise UserError(f"{path} is a folder; name the file to write")
        if path and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written")
    if options.picture and options.picture.suffix not in PICTURES:
        raise UserError(f"--picture is {options.picture}; its name must end in {', '.join(PICTURES)}")
    if options.csv and options.csv.suffix in PICTURES:
        raise UserError(f"--csv is {options.csv}, a picture's name; the picture is --picture's")
    device = find_device(options.device)
    if options.clock == "cpu" and (options.threads != 1 or device.type != "cpu"):
        raise UserError("--clock cpu sees one thread of the CPU only: add --threads 1 --device cpu")
    if options.mlflow:
        _begin_mlflow(options.mlflow)
    figures: list[Figure] = []
    clock = CLOCKS[options.clock]
    cores: Sequence[int] = ()
    try:
        with pinned(options.threads) as cores:
            _say_where(device, cores)
            for dtype in dtypes:
                subject = make_subject(options.shape, DTYPES[dtype], options.backend, options.layers, device)
                for scope in scopes:
                    for batch, length in calls:
                        rivals = make_rivals(device) if options.rivals and scope == "ffn" else None
                        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "mixed"):
                            found, samples = measure(
                                subject, scope, batch, length, sparsities, options.repeats, rivals, clock
                            )
                        _print(found, samples, subject.layers)
                        figures += found
    finally:  # what was measured is kept, whatever ends the rest
        if figures:
            _write(figures, options, {"device": str(device), "cores": _named(cores)})
    return figures


def _begin_mlflow(experiment: str) -> None:
    import mlflow

    from lte_lightning.errors import UserError
    from lte_lightning.store import mlflow_store, reason, shown

    uri = mlflow_store(os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
    except mlflow.MlflowException as error:
        raise UserError(f"MLflow at {shown(uri)} cannot be used: {reason(error)}") from error


def _one_of(text: str, known: Sequence[str], what: str) -> list[str]:
    from lte_lightning.errors import UserError

    values = dict.fromkeys(text.split(","))
    for value in values:
        if value not in known:
            raise UserError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    return list(values)


def _numbers(text: str) -> list[float]:
    from lte_lightning.errors import UserError

    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"--sparsity is {text!r}; it takes shares between 0 and 1 with commas, like {SPARSITIES}")
    return values


def _tokens(text: str) -> tuple[int, int]:
    from lte_lightning.errors import UserError

    words = text.split("x")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(words) > 2:
        raise UserError(f"--tokens is {text!r}; it takes a number like 4, or sequences x tokens like 32x128")
    return int(words[0]), int(words[1]) if len(words) == 2 else 1


def _say_where(device: "torch.device", cores: Sequence[int]) -> None:
    import torch

    count, load = os.cpu_count() or 1, os.getloadavg()[0]
    threads = counted(torch.get_num_threads(), "thread")
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    print(
        f"{gpu}{platform.machine()}, {count} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, {threads} on cores {_named(cores)}, load {load:.2f}"
    )
    if load > 0.25 * count:
        print(f"warning: this machine is busy (load {load:.2f} on {count} cores): expect noise", file=sys.stderr)


def _named(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores)) or "of the system's choice"


def counted(count: int, what: str) -> str:
    """Returns ``1 token`` or ``2 tokens``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _print(figures: "list[Figure]", samples: dict[Any, list[float]], layers: int) -> None:
    first = figures[0]
    low, high = _quartiles(samples["dense"])
    print(
        f"\n{first.shape} {first.scope}, {first.phase}, {first.dtype}, {counted(first.tokens, 'token')}, "
        f"{counted(layers, 'layer')}: "
        f"dense {first.dense_ms:.3f} ms [{low:.3f} .. {high:.3f}], router {first.router_ms:.3f} ms"
    )
    print(f"{'sparsity':>8}  {'backend':16}{'ms':>10}  {'quartiles':^21}{'ratio':>7}{'bound':>7}{'share':>7}")
    for f in figures:
        low, high = _quartiles(samples[f.sparsity, f.backend])
        print(
            f"{f.sparsity:8.0%}  {f.backend:16}{f.ms:10.3f}  {f'{low:.3f} .. {high:.3f}':^21}"
            f"{f.ratio:7.2f}{f.bound:7.2f}{f.share_of_bound:7.0%}"
        )


def _quartiles(times: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return low, high


def _write(figures: "list[Figure]", options: argparse.Namespace, machine: dict[str, str]) -> None:
    from lte_lightning.bench.measure import COLUMNS, as_row
    from lte_lightning.bench.picture import draw

    with tempfile.TemporaryDirectory() as passing:  # for what only MLflow keeps
        table: Path | None = options.csv or (Path(passing) / "bench.csv" if options.mlflow else None)
        picture: Path | None = options.picture or (table.with_suffix(".png") if table else None)
        if table:
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(map(as_row, figures))
        if picture:
            draw(figures, picture)
        written = [path for path in (table, picture) if path]
        if options.mlflow:
            import mlflow

            with mlflow.start_run(run_name=f"bench {options.shape}"):
                mlflow.log_params({key: str(value) for key, value in (vars(options) | machine).items()})
                for path in written:
                    mlflow.log_artifact(str(path))
        named = [str(path) for path in written if path.parent != Path(passing)]
    if named:
        print(f"\nwritten: {', '.join(named)}")

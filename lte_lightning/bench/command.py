"""``lte bench``: its options, what they may be, and the order of the measurements."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lte_lightning.errors import UserError
from lte_lightning.files import require_place

if TYPE_CHECKING:
    from lte_lightning.bench.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
SPARSITIES = "0,0.25,0.5,0.65,0.8,0.9,0.95"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; what the user can put right is said in one message."""
    from lte_lightning.options import call

    try:
        call(bench, "lte bench", sys.argv[1:] if args is None else args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def bench(
    shape: str = "llama2-7b",
    scope: str = "ffn,model",
    dtype: str = "f32,bf16",
    tokens: str = "1",
    sparsity: str = SPARSITIES,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    layers: int | None = None,
    repeats: int = 11,
    clock: str = "wall",
    rivals: bool = False,
    csv: Path | None = None,
    picture: Path | None = None,
    mlflow: str | None = None,
) -> None:
    """Measures what skipping experts saves: latency against the dense model, sparsity by sparsity.

    Args:
        shape: llama2-7b, smollm2-135m or roberta-base with random weights, or a converted model's folder or hub id.
        scope: ffn (one FFN block), model (all measured layers, both stacks of an encoder-decoder; never the head, so
            that a folder compares with a named shape), or both with a comma.
        dtype: f32, bf16, f16, mixed (f32 weights, bf16 autocast), several with commas.
        tokens: Tokens per call, several with commas. 4 decodes for 4 sequences, 32x128 is 32 sequences of 128 tokens.
        sparsity: Shares of experts that each token skips.
        backend: auto, dense-mask, reference, cpu or triton.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.
        threads: torch's threads, bound to as many cores while it measures. By default torch's own choice.
        layers: Layers of a named shape. By default FFN weights of eight times the last cache.
        repeats: Rounds, after one that is not counted.
        clock: wall, or cpu: time of one thread, for machines that are never quiet.
        rivals: Measure the obvious alternatives besides, in scope ffn.
        csv: Write one row per figure here.
        picture: Draw speed-up against sparsity here. By default beside the CSV.
        mlflow: Log the CSV and the picture in this experiment (MLFLOW_TRACKING_URI, or mlflow.db).

    Raises:
        UserError: If an option's value is not one.
    """
    options = dict(locals())
    import torch

    from lte_lightning.bench.machine import CLOCKS, find_backend, find_device, pinned
    from lte_lightning.bench.measure import measure
    from lte_lightning.bench.output import named, say_where, show
    from lte_lightning.bench.rivals import make_rivals
    from lte_lightning.bench.subject import DTYPES, make_subject

    scopes = _one_of(scope, ("ffn", "model"), "scope")
    dtypes = _one_of(dtype, tuple(DTYPES), "dtype")
    runs_on = find_backend(backend)
    _one_of(clock, tuple(CLOCKS), "clock")
    sparsities = sorted(_numbers(sparsity))
    calls = [_tokens(text) for text in tokens.split(",")]
    for name in ("threads", "layers", "repeats"):
        value = options[name]
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    check_files(csv, picture)
    where = find_device(device)
    if clock == "cpu" and (threads != 1 or where.type != "cpu"):
        raise UserError("--clock cpu sees one thread of the CPU only: add --threads 1 --device cpu")
    if mlflow:
        _begin_mlflow(mlflow)
    figures: list[Figure] = []
    cores: Sequence[int] = ()
    try:
        with pinned(threads) as cores:
            say_where(where, cores)
            for each in dtypes:
                subject = make_subject(shape, DTYPES[each], runs_on, layers, where)
                for part in scopes:
                    for batch, length in calls:
                        others = make_rivals(where) if rivals and part == "ffn" else None
                        with torch.autocast(where.type, torch.bfloat16, enabled=each == "mixed"):
                            rows, samples = measure(
                                subject, part, batch, length, sparsities, repeats, others, CLOCKS[clock]
                            )
                        show(rows, samples, subject.layers)
                        figures += rows
    finally:  # what was measured is kept, whatever ends the rest
        if figures:
            _write(figures, csv, picture, options | {"device": str(where), "cores": named(cores)})


def check_files(csv: Path | None, picture: Path | None) -> None:
    """Checks where figures and their picture are to be written.

    Raises:
        UserError: If a file cannot be written there, or its name is of another kind.
    """
    for path in (csv, picture):
        if path:
            require_place(path)
    if picture and picture.suffix not in PICTURES:
        raise UserError(f"--picture is {picture}; its name must end in {', '.join(PICTURES)}")
    if csv and csv.suffix in PICTURES:
        raise UserError(f"--csv is {csv}, a picture's name; the picture is --picture's")


def _begin_mlflow(experiment: str) -> None:
    import mlflow

    from lte_lightning.network import try_store
    from lte_lightning.store import mlflow_store, reason, shown

    uri = mlflow_store(os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        try_store(uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
    except (mlflow.MlflowException, UserError) as error:
        raise UserError(f"MLflow at {shown(uri)} cannot be used: {reason(error)}") from error


def _one_of(text: str, known: Sequence[str], what: str) -> list[str]:
    values = dict.fromkeys(text.split(","))
    for value in values:
        if value not in known:
            raise UserError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    return list(values)


def _numbers(text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"--sparsity is {text!r}; it takes shares between 0 and 1 with commas, like {SPARSITIES}")
    return values


def _tokens(text: str) -> tuple[int, int]:
    words = text.split("x")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(words) > 2:
        raise UserError(f"--tokens is {text!r}; it takes a number like 4, or sequences x tokens like 32x128")
    return int(words[0]), int(words[1]) if len(words) == 2 else 1


def _write(figures: "list[Figure]", csv: Path | None, picture: Path | None, options: dict[str, Any]) -> None:
    """Writes the CSV file and the picture, and logs them in MLflow's experiment if there is one."""
    from lte_lightning.bench.output import write_table
    from lte_lightning.bench.picture import draw
    from lte_lightning.network import failures
    from lte_lightning.store import reason

    with tempfile.TemporaryDirectory() as passing:  # for what only MLflow keeps
        table = csv or (Path(passing) / "bench.csv" if options["mlflow"] else None)
        picture = picture or (table.with_suffix(".png") if table else None)
        if table:
            write_table(figures, table)
        if picture:
            draw(figures, picture)
        written = [path for path in (table, picture) if path]
        if options["mlflow"]:
            import mlflow

            try:
                with mlflow.start_run(run_name=f"bench {options['shape']}"):
                    mlflow.log_params({key: str(value) for key, value in options.items()})
                    for path in written:
                        mlflow.log_artifact(str(path))
            except failures() as error:
                raise UserError(f"MLflow did not take the results: {reason(error)}") from None
        named = [str(path) for path in written if path.parent != Path(passing)]
    if named:
        print(f"\nwritten: {', '.join(named)}")

"""``lte bench``: its options, their checks, and the order of the measurements."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lte_lightning.bench.option_values import SPARSITIES, check_files, numbers, one_of, read_tokens
from lte_lightning.errors import UserError

if TYPE_CHECKING:
    from lte_lightning.bench.compare import Judges
    from lte_lightning.bench.timing_row import Timing


def main(args: Sequence[str] | None = None, judges: "Judges | None" = None) -> int:
    """Runs the command and returns its exit code; a mistake of the user is one message on stderr.

    Args:
        args: The command line.
        judges: Measures quality when whole models are compared and validation rows are available.
    """
    from lte_lightning.options import call

    try:
        rest = call(bench, "lte bench", sys.argv[1:] if args is None else args, positional="shape")
        if rest is not None:
            rest(judges)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def bench(
    shape: str = "llama2-7b",
    scope: str = "ffn,model",
    against: str | None = None,
    dtype: str | None = None,
    tokens: str = "1",
    sparsity: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    layers: int | None = None,
    repeats: int = 11,
    clock: str = "wall",
    rivals: bool = False,
    ways: str | None = None,
    new_tokens: int = 64,
    data: str | None = None,
    csv: Path | None = None,
    picture: Path | None = None,
    mlflow: str | None = None,
) -> "Callable[[Judges | None], None] | None":
    """Measures what skipping experts saves: latency against the dense model, sparsity by sparsity.

    lte bench RUN --against llama.cpp,openvino,onnxruntime

    Args:
        shape: llama2-7b, smollm2-135m or roberta-base with random weights, or a converted model's folder or hub id.
            Whole models may also be plain (not converted).
        scope: ffn (one FFN block); model (all measured layers, both stacks of an encoder-decoder, without the head, so
            that a folder compares with a named shape); ffn,model for both; or generate (tokens per second of a whole
            decoder).
        against: llama.cpp, openvino, onnxruntime, several with commas. Measures tokens per second of the whole dense
            model in each engine and in torch, beside the sparse model.
        dtype: f32, bf16, f16, mixed (f32 weights, bf16 autocast), several with commas; by default f32,bf16. Whole
            models take int8 and int4 instead of mixed; their default is bf16, or bf16,int8 with --against.
        tokens: Tokens per call, several with commas. 4 decodes 4 sequences; 32x128 is 32 sequences of 128 tokens.
        sparsity: Shares of experts that each token skips, by default 0,0.25,0.5,0.65,0.8,0.9,0.95. For whole models
            this sets the routers' biases, and quality is not measured. By default, trained routers stay as they are
            and untrained routers skip 0.8.
        backend: auto, dense-mask, reference, cpu or triton.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.
        threads: Number of torch threads, bound to as many cores during the measurement. By default torch chooses.
        layers: Layers of a named shape. By default enough that the FFN weights fill the last-level cache eight times.
        repeats: Measured rounds, after one warm-up round.
        clock: wall; or cpu, the time of one thread, for machines that are never quiet.
        rivals: Also measure the obvious alternatives, in scope ffn.
        ways: How torch runs whole models: eager, compiled, fused (int8 and int4 on a CPU), captured (a CUDA
            graph), several with commas. By default every way that the device supports.
        new_tokens: Tokens that a whole model decodes after a prompt of 32.
        data: A configuration (.yaml) or a text file with the rows for measuring quality, with --against. By default
            the run's own validation rows.
        csv: Write one row per measurement to this file.
        picture: Draw speed-up against sparsity in this file. By default beside the CSV.
        mlflow: Log the CSV and the picture in this experiment (at MLFLOW_TRACKING_URI, or in mlflow.db).

    Raises:
        UserError: If an option has an invalid value.
    """
    options = dict(locals())
    scopes = one_of(scope, ("ffn", "model", "generate"), "scope")
    if against is not None or "generate" in scopes:
        from lte_lightning.bench.planning import plan_whole

        return plan_whole(**options)
    for name, default in (("ways", None), ("new_tokens", 64), ("data", None)):
        if options[name] != default:
            raise UserError(f"--{name.replace('_', '-')} is for whole models: add --scope generate or --against")
    sparsity, dtype = sparsity or SPARSITIES, dtype or "f32,bf16"
    options |= {"sparsity": sparsity, "dtype": dtype}
    import torch

    from lte_lightning.bench.keeping import begin_mlflow, write
    from lte_lightning.bench.machine import CLOCKS, find_backend, find_device, pinned
    from lte_lightning.bench.measure import measure
    from lte_lightning.bench.output import named, say_where, show
    from lte_lightning.bench.picture import draw
    from lte_lightning.bench.rivals import make_rivals
    from lte_lightning.bench.subject import DTYPES, make_subject

    dtypes = one_of(dtype, tuple(DTYPES), "dtype")
    runs_on = find_backend(backend)
    one_of(clock, tuple(CLOCKS), "clock")
    sparsities = sorted(numbers(sparsity))
    calls = [read_tokens(text) for text in tokens.split(",")]
    for name in ("threads", "layers", "repeats"):
        value = options[name]
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    check_files(csv, picture)
    where = find_device(device)
    if clock == "cpu" and (threads != 1 or where.type != "cpu"):
        raise UserError("--clock cpu times a single CPU thread; add --threads 1 --device cpu")
    if mlflow:
        begin_mlflow(mlflow)
    timings: list[Timing] = []
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
                        timings += rows
    finally:  # keep finished measurements if a later one fails
        if timings:
            write(timings, csv, picture, options | {"device": str(where), "cores": named(cores)}, draw)
    return None

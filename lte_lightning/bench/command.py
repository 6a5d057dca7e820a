"""``lte bench``: its options, what they may be, and the order of the measurements."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lte_lightning.bench.words import SPARSITIES, check_files, numbers, one_of, read_tokens
from lte_lightning.errors import UserError

if TYPE_CHECKING:
    from lte_lightning.bench.compare import Judges
    from lte_lightning.bench.figure import Figure


def main(args: Sequence[str] | None = None, judges: "Judges | None" = None) -> int:
    """Runs the command and returns its exit code; what the user can put right is said in one message.

    Args:
        args: The command line.
        judges: Measures quality, where models are compared that have rows to measure it on.
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
        shape: llama2-7b, smollm2-135m or roberta-base with random weights, or a converted model's folder or hub id,
            which may be named without the option's name. Whole models may be plain ones, too.
        scope: ffn (one FFN block), model (all measured layers, both stacks of an encoder-decoder; never the head, so
            that a folder compares with a named shape), or both with a comma; or generate: tokens per second of whole
            models that decode.
        against: llama.cpp, openvino, onnxruntime, several with commas: tokens per second of the whole dense model in
            each, of torch's, and of ours.
        dtype: f32, bf16, f16, mixed (f32 weights, bf16 autocast), several with commas; by default f32,bf16. Whole
            models take int8 and int4, too, and no mixed; by default bf16, beside other engines bf16,int8.
        tokens: Tokens per call, several with commas. 4 decodes for 4 sequences, 32x128 is 32 sequences of 128 tokens.
        sparsity: Shares of experts that each token skips, by default 0,0.25,0.5,0.65,0.8,0.9,0.95. Of whole models
            they set the routers' biases, and nobody measures their quality; by default routers stay as they were
            trained, and those that were not skip 0.8.
        backend: auto, dense-mask, reference, cpu or triton.
        device: cpu, cuda or cuda:1; auto takes a CUDA device where there is one.
        threads: torch's threads, bound to as many cores while it measures. By default torch's own choice.
        layers: Layers of a named shape. By default FFN weights of eight times the last cache.
        repeats: Rounds, after one that is not counted.
        clock: wall, or cpu: time of one thread, for machines that are never quiet.
        rivals: Measure the obvious alternatives besides, in scope ffn.
        ways: How torch runs whole models: eager, compiled, fused (int8 and int4 on a CPU), captured (a CUDA
            graph), several with commas. By default all that the device has.
        new_tokens: Tokens that a whole model decodes behind a prompt of 32.
        data: A configuration (.yaml) or a text with the rows that quality is measured on, beside other engines. By
            default the run's own.
        csv: Write one row per figure here.
        picture: Draw speed-up against sparsity here. By default beside the CSV.
        mlflow: Log the CSV and the picture in this experiment (MLFLOW_TRACKING_URI, or mlflow.db).

    Raises:
        UserError: If an option's value is not one.
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
        raise UserError("--clock cpu sees one thread of the CPU only: add --threads 1 --device cpu")
    if mlflow:
        begin_mlflow(mlflow)
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
            write(figures, csv, picture, options | {"device": str(where), "cores": named(cores)}, draw)
    return None

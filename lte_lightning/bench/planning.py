"""The options of ``lte bench`` for whole models, read and checked before a model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lte_lightning.bench.compare import Judges, Plan, compare
from lte_lightning.bench.decoding import WAYS
from lte_lightning.bench.engines import find_engines
from lte_lightning.bench.keeping import begin_mlflow, write
from lte_lightning.bench.machine import find_backend, find_device, pinned
from lte_lightning.bench.option_values import check_files, numbers, one_of, read_tokens
from lte_lightning.bench.output import named, say_where
from lte_lightning.bench.rates import RATES_FILE, Rate, draw_rates
from lte_lightning.bench.whole import TYPES
from lte_lightning.core.model.quantize import QUANTIZATIONS
from lte_lightning.errors import UserError


def plan_whole(**options: Any) -> Callable[[Judges | None], None]:
    """Checks the options, and returns a function that measures, prints and writes.

    Args:
        **options: The options of ``lte bench``.

    Raises:
        UserError: If an option has an invalid value, or no effect for whole models.
    """
    against, scope = options["against"], options["scope"]
    if scope not in ("generate", "ffn,model") or (against is not None and scope == "generate"):
        raise UserError(
            f"--scope is {scope}; generate does not combine with another scope, and --against already measures the "
            "whole model, so leave --scope out"
        )
    for name, default in (("rivals", False), ("clock", "wall")):
        if options[name] != default:
            raise UserError(f"--{name} is for the scopes ffn and model; leave it out")
    engines = [] if against is None else find_engines(against)
    dtypes = one_of(options["dtype"] or ("bf16,int8" if engines else "bf16"), TYPES, "dtype")
    for name in ("threads", "layers", "repeats", "new_tokens"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}; it must be at least 1")
    wanted = options["device"]
    device = find_device("cpu" if wanted == "auto" and (engines or {*dtypes} & {*QUANTIZATIONS}) else wanted)
    if device.type != "cpu" and (engines or {*dtypes} & {*QUANTIZATIONS}):
        what = "other engines are" if engines else "int8 and int4 are"
        raise UserError(f"--device is {wanted}, but {what} measured on the CPU; leave it out")
    other = "fused" if device.type == "cuda" else "captured"  # the way that this device lacks
    has = [way for way in WAYS if way != other]
    ways = one_of(options["ways"] or ",".join(has), WAYS, "way")
    if other in ways:
        what = "captured is a CUDA graph, and torch runs on the CPU here"
        if other == "fused":
            what = "fused is a way of the CPU kernels, and torch runs on the GPU here"
        raise UserError(f"{what}; leave it out of --ways")
    calls = [read_tokens(text) for text in options["tokens"].split(",")]
    if options["scope"] == "generate" and any(length > 1 for _, length in calls):
        raise UserError(
            f"--tokens is {options['tokens']}; with --scope generate it is the number of sequences, for example 4"
        )
    sparsities = None if options["sparsity"] is None else sorted(numbers(options["sparsity"]))
    if options["data"] is not None and sparsities is not None:
        raise UserError(
            "--data measures quality, but --sparsity replaces the trained routers' biases; leave one of them out"
        )
    check_files(options["csv"], options["picture"])
    backend = find_backend(options["backend"])
    if options["mlflow"]:
        begin_mlflow(options["mlflow"])

    def run(judges: Judges | None) -> None:
        rates: list[Rate] = []
        cores: list[int] = []
        try:
            with pinned(options["threads"]) as cores:
                say_where(device, cores)
                for sequences, length in calls:
                    plan = Plan(
                        options["shape"], engines, dtypes, ways, sequences, length, options["new_tokens"], sparsities,
                        device, backend, options["layers"], options["repeats"], options["data"],
                    )  # fmt: skip
                    rates += compare(plan, judges)
        finally:  # keep finished measurements if a later one fails
            if rates:
                csv, picture = (_beside(options["shape"], options[name], end) for name, end in _FILES)
                write(rates, csv, picture, options | {"device": str(device), "cores": named(cores)}, draw_rates)

    return run


_FILES = (("csv", RATES_FILE), ("picture", "engines.png"))


def _beside(shape: str, file: Path | None, name: str) -> Path | None:
    """Returns where to write; the results of a run go into its folder, where its report looks for them."""
    run = Path(shape)
    is_run = run.is_dir() and (run / "model").is_dir() and (run / "config.yaml").is_file()
    return file or (run / name if is_run else None)

"""``lte bench --scope generate`` and ``--against``: tokens per second of whole models, in torch and other engines."""

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from lte_lightning import __version__
from lte_lightning.bench.decoding import Arm, decoder, even_routers, forward, set_biases
from lte_lightning.bench.engines import Engine, start_all
from lte_lightning.bench.jobs import Job, Logits, Started
from lte_lightning.bench.measure import interleave
from lte_lightning.bench.narrow import NARROW, narrowed
from lte_lightning.bench.rates import Rate, show_rates
from lte_lightning.bench.whole import DTYPES, Whole, find_whole, typed_copy
from lte_lightning.core.model.fusable import why_not_fused
from lte_lightning.core.model.quantize import QUANTIZATIONS
from lte_lightning.core.model.quantize_plain import quantize_plain
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.processor import processor
from lte_lightning.kernels.dispatch import Backend

PROMPT = 32  # tokens of the prompt before decoding
UNTRAINED = 0.8  # default sparsity of untrained routers


class Judge(Protocol):
    """Measures quality on a run's validation rows."""

    metric: str

    def __call__(self, logits: Logits) -> float:
        """Returns the metric of a model that computes these logits."""

    def calibration(self) -> Sequence[Mapping[str, torch.Tensor]]:
        """Returns a few training batches, without labels."""


Judges = Callable[[str, str | None], Judge]


@dataclass(frozen=True)
class Plan:
    """The measurements to make; see the options of ``lte bench``.

    Args:
        shape: A folder, or a named shape.
        engines: The engines of ``--against``.
        dtypes: Types of the weights.
        ways: How torch runs the models.
        sequences: Sequences per batch.
        length: Tokens per sequence of a forward pass; 1 decodes.
        new_tokens: Tokens to decode.
        sparsities: Sparsities to set the routers to; None keeps trained routers as they are.
        device: Where torch runs.
        backend: Backend of the sparse model.
        layers: Layers of a named shape.
        repeats: Rounds.
        data: Source of validation rows in place of the run's own configuration.
    """

    shape: str
    engines: Sequence[Engine]
    dtypes: Sequence[str]
    ways: Sequence[str]
    sequences: int
    length: int
    new_tokens: int
    sparsities: Sequence[float] | None
    device: torch.device
    backend: Backend
    layers: int | None
    repeats: int
    data: str | None

    @property
    def decodes(self) -> bool:
        """Whether tokens are decoded after a prompt."""
        return self.length == 1


@dataclass
class _Row:
    engine: str
    dtype: str
    way: str
    arm: Arm
    logits: Callable[[], Logits | None]
    version: str
    sparsity: float = 0.0


@torch.no_grad()
def compare(plan: Plan, judges: Judges | None) -> list[Rate]:
    """Measures, prints and returns the rows.

    Raises:
        UserError: If the model cannot be measured this way, or ``data`` was given and has no rows for it.
    """
    whole = find_whole(plan.shape, plan.layers, plan.backend)
    decodes = plan.decodes
    if decodes and not whole.decodes:
        raise UserError(
            f"{plan.shape} is a {type(whole.dense).__name__}, which does not generate text; give --tokens "
            "SEQUENCESxTOKENS for a forward pass, for example 32x128"
        )
    batch = whole.batch(plan.sequences, PROMPT if decodes else plan.length, plan.device)
    judge = _judge(plan, whole, judges)
    if "compiled" in plan.ways and plan.device.type == "cpu" and library() is None:
        print("compiled models are not measured: there is no C++ compiler here", file=sys.stderr)
    rows = _torch_rows(plan, whole, batch)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            whole.dense,
            whole.tokenizer,
            batch,
            plan.new_tokens if decodes else None,
            torch.get_num_threads(),
            judge.calibration() if judge and plan.engines else [batch],
            Path(folder),
        )
        rows += _engine_rows(plan, job, plan.dtypes)
        for sparsity in {round(row.sparsity, 2): row.sparsity for row in rows if row.engine == "ours"}.values():
            if plan.engines and "int8" in plan.dtypes and sparsity > 0:
                rows += _narrow_rows(plan, job, sparsity)
        arms: dict[Any, Callable[[], Sequence[float]]] = {str(i): partial(_once, row.arm) for i, row in enumerate(rows)}
        samples = interleave(arms, plan.repeats)
        base = statistics.median(samples["0"])
        rates, quality = [], dict[tuple[str, str, float], float]()
        for i, row in enumerate(rows):
            rate = statistics.median(samples[str(i)])
            rates.append(
                Rate(
                    plan.shape, row.engine, row.dtype, row.way, "decode" if decodes else "forward", plan.sequences,
                    batch["input_ids"].shape[1], plan.new_tokens if decodes else 0, row.sparsity, job.threads, rate,
                    min(samples[str(i)]), max(samples[str(i)]), rate / base, judge.metric if judge else "", math.nan,
                    row.version, processor(), os.getloadavg()[0],
                )
            )  # fmt: skip
        for i, row in enumerate(rows if judge else []):
            key = (row.engine, row.dtype, row.sparsity)
            if key not in quality and (logits := row.logits()) is not None:
                quality[key] = judge(logits)  # type: ignore[misc]
            rates[i] = replace(rates[i], quality=quality.get(key, math.nan))
    show_rates(rates)
    return rates


def _engine_rows(plan: Plan, job: Job, dtypes: Sequence[str], narrow: float = 0.0) -> list[_Row]:
    started, reasons = start_all(plan.engines, job, dtypes)
    for reason in reasons if not narrow else ():  # they were said of the dense model
        print(reason, file=sys.stderr)
    versions, behind = {engine.name: engine.version for engine in plan.engines}, f" {NARROW}" if narrow else ""
    return [
        _Row(name + behind, dtype, "", engine.arm, partial(_logits_of, engine), versions[name], narrow)
        for (name, dtype), engine in started.items()
    ]


def _narrow_rows(plan: Plan, job: Job, sparsity: float) -> list[_Row]:
    """A narrower dense model in int8, as wide as what runs of ours: on our kernels, and in each engine."""
    model, left_out = narrowed(job.model, sparsity, job.calibration)
    folder = job.folder / f"narrow-{left_out:.4f}"
    folder.mkdir()
    twin = quantize_plain(typed_copy(model, "bf16"), "int8")
    ways = _ways_of(plan, twin)
    ways = ["fused"] if "fused" in ways else ways  # the fastest
    rows = _rows(plan, NARROW, "int8", ways, twin, job.batch, lambda: None, left_out)
    return rows + _engine_rows(plan, replace(job, model=model, folder=folder), ["int8"], left_out)


def _once(arm: Arm) -> list[float]:
    return [arm()]


def _judge(plan: Plan, whole: Whole, judges: Judges | None) -> Judge | None:
    if judges is None or plan.sparsities is not None or not whole.trained or not plan.engines:
        return None
    try:
        return judges(plan.shape, plan.data)
    except UserError as error:
        if plan.data is not None:
            raise
        print(f"quality is not measured: {error}", file=sys.stderr)
        return None


def _torch_rows(plan: Plan, whole: Whole, batch: Mapping[str, torch.Tensor]) -> list[_Row]:
    rows: list[_Row] = []
    for dtype in [dtype for dtype in plan.dtypes if dtype in DTYPES] or ["bf16"]:
        model = whole.plain(dtype, plan.device)
        ways = _ways_of(plan, None) or ["eager"]  # the first row is what ratios are to
        rows += _rows(plan, "dense", dtype, ways, model, batch, lambda: None, 0.0)
    sparsities = plan.sparsities or (None if whole.trained else [UNTRAINED])
    for dtype in plan.dtypes:
        model = whole.make(dtype)
        if dtype not in QUANTIZATIONS:
            torch.nn.Module.to(model, plan.device)
        torch._dynamo.reset()
        ways = _ways_of(plan, model)
        if plan.decodes and "fused" in plan.ways and (why := why_not_fused(model)):
            print(f"ours {dtype} is not measured fused: {why}", file=sys.stderr)
        if sparsities is None:
            rows += _rows(plan, "ours", dtype, ways, model, batch, lambda: None, _sparsity(model, batch))
        for sparsity in sparsities or []:
            biases = even_routers(model, sparsity, batch)
            before = partial(set_biases, model, biases)
            rows += _rows(plan, "ours", dtype, ways, model, batch, before, _sparsity(model, batch))
    return rows


def _ways_of(plan: Plan, model: PreTrainedModel | None) -> list[str]:
    """Returns how torch can run a model; None is a dense one."""
    ways = [way for way in plan.ways if plan.decodes or way in ("eager", "compiled")]
    if "compiled" in ways and plan.device.type == "cpu" and library() is None:
        ways.remove("compiled")
    if "fused" in ways and (model is None or why_not_fused(model)):
        ways.remove("fused")
    return ways


def _rows(
    plan: Plan,
    engine: str,
    dtype: str,
    ways: Sequence[str],
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    before: Callable[[], None],
    sparsity: float,
) -> list[_Row]:
    """Returns a row for each way that torch runs a model; ``before`` is called before each pass."""
    made_by = f"torch {version('torch')}" + ("" if engine == "dense" else f", lte-lightning {__version__}")

    def logits() -> Logits:
        before()
        return _calls(model)

    def row(way: str) -> _Row:
        run = decoder(model, batch["input_ids"], plan.new_tokens, way) if plan.decodes else forward(model, batch, way)

        def arm() -> float:
            before()
            return run()

        return _Row(engine, dtype, way, arm, logits, made_by, sparsity)

    return [row(way) for way in ways]


def _sparsity(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> float:
    with RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    return float(trace.sparsity())


def _logits_of(engine: Started) -> Logits | None:
    if engine.logits is not None or engine.model is None:
        return engine.logits
    return _calls(engine.model())


def _calls(model: Any) -> Logits:
    return lambda inputs: model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.float()

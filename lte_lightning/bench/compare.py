"""``lte bench --scope generate`` and ``--against``: whole models in tokens per second, ours beside what others run."""

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
from lte_lightning.bench.rates import Rate, show_rates
from lte_lightning.bench.whole import DTYPES, Whole, find_whole
from lte_lightning.core.model.quantize import QUANTIZATIONS
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.cpu.processor import processor
from lte_lightning.kernels.dispatch import Backend

PROMPT = 32  # tokens that are decoded behind
UNTRAINED = 0.8  # the sparsity of routers that nobody trained, unless another is asked for


class Judge(Protocol):
    """Who measures quality on a run's validation rows."""

    metric: str

    def __call__(self, logits: Logits) -> float:
        """Returns the metric of a model that gives these logits."""

    def calibration(self) -> Sequence[Mapping[str, torch.Tensor]]:
        """Returns some training batches, without labels."""


Judges = Callable[[str, str | None], Judge]


@dataclass(frozen=True)
class Plan:
    """What is to be measured; see the options of ``lte bench``.

    Args:
        shape: A folder, or a named shape.
        engines: Those of ``--against``.
        dtypes: Of the weights.
        ways: How torch runs.
        sequences: At once.
        length: Tokens of each in a forward pass; 1 decodes.
        new_tokens: To decode.
        sparsities: To set the routers to; None leaves those that were trained.
        device: Where torch runs.
        backend: Of the sparse model.
        layers: Of a named shape.
        repeats: Rounds.
        data: Where validation rows are from, instead of the run's own configuration.
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
        UserError: If the model is none that can be measured so, or names no rows though ``data`` was given.
    """
    whole = find_whole(plan.shape, plan.layers, plan.backend)
    decodes = plan.length == 1
    if decodes and not whole.decodes:
        raise UserError(
            f"{plan.shape} is a {type(whole.dense).__name__}, which goes on from no text; give --tokens sequences x "
            "tokens of a forward pass, like 32x128"
        )
    batch = whole.batch(plan.sequences, PROMPT if decodes else plan.length, plan.device)
    judge = _judge(plan, whole, judges)
    rows = _torch_rows(plan, whole, batch, decodes)
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
        started, reasons = start_all(plan.engines, job, plan.dtypes)
        for reason in reasons:
            print(reason, file=sys.stderr)
        versions = {engine.name: engine.version for engine in plan.engines}
        for (name, dtype), engine in started.items():
            rows.append(_Row(name, dtype, "", engine.arm, partial(_logits_of, engine), versions[name]))
        arms: dict[Any, Callable[[], Sequence[float]]] = {str(i): partial(_once, row.arm) for i, row in enumerate(rows)}
        samples = interleave(arms, plan.repeats)
        base = statistics.median(samples["0"])
        found, quality = [], dict[tuple[str, str, float], float]()
        for i, row in enumerate(rows):
            rate = statistics.median(samples[str(i)])
            found.append(
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
            found[i] = replace(found[i], quality=quality.get(key, math.nan))
    show_rates(found)
    return found


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


def _torch_rows(plan: Plan, whole: Whole, batch: Mapping[str, torch.Tensor], decodes: bool) -> list[_Row]:
    ways = list(plan.ways)
    if not decodes and "captured" in ways:
        ways.remove("captured")
    if "compiled" in ways and plan.device.type == "cpu" and library() is None:
        print("compiled models are not measured: there is no C++ compiler here", file=sys.stderr)
        ways.remove("compiled")

    def add(engine: str, dtype: str, model: PreTrainedModel, before: Callable[[], None], sparsity: float) -> None:
        for way in ways:
            run = decoder(model, batch["input_ids"], plan.new_tokens, way) if decodes else forward(model, batch, way)

            def arm(run: Arm = run) -> float:
                before()
                return run()

            def logits() -> Logits:
                before()
                return _calls(model)

            made_by = f"torch {version('torch')}" + (f", lte-lightning {__version__}" if engine == "ours" else "")
            rows.append(_Row(engine, dtype, way, arm, logits, made_by, sparsity))

    rows: list[_Row] = []
    for dtype in [dtype for dtype in plan.dtypes if dtype in DTYPES] or ["bf16"]:
        add("dense", dtype, whole.plain(dtype, plan.device), lambda: None, 0.0)
    sparsities = plan.sparsities or (None if whole.trained else [UNTRAINED])
    for dtype in plan.dtypes:
        model = whole.make(dtype)
        if dtype not in QUANTIZATIONS:
            torch.nn.Module.to(model, plan.device)
        torch._dynamo.reset()
        if sparsities is None:
            add("ours", dtype, model, lambda: None, _sparsity(model, batch))
        for sparsity in sparsities or []:
            biases = even_routers(model, sparsity, batch)
            add("ours", dtype, model, partial(set_biases, model, biases), _sparsity(model, batch))
    return rows


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

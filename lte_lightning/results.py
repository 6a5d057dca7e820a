"""The results of a fit and of a test as types, written and read here alone: ``results.json`` and ``test.json``."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from lte_lightning.errors import UserError
from lte_lightning.files import abridged, read_json, write_json

LOWER_IS_BETTER = ("perplexity", "loss", "mae", "mse")
FILE = "results.json"  # of a fit, in its run folder
PROGRESS = "progress.json"
View = Literal["dense", "soft", "hard_before", "hard"]
Record = TypeVar("Record", bound="Evaluation")


def better(metric: str, one: float, other: float) -> bool:
    """Says whether a value of a metric is better than another."""
    return one < other if metric.startswith(LOWER_IS_BETTER) else one > other


def json_value(value: Any) -> Any:
    """Returns the value, or None for what JSON cannot say."""
    # JSON has no NaN, which a correlation of constant predictions is
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(kw_only=True)
class Evaluation:
    """The results of a test (``test.json``). A value that was not measured, or is not defined, is None.

    Attributes:
        sparsity: Share of the FFN neurons that do not run, over real tokens and layers; 0 to 1.
        sparsity_per_layer: The same of each FFN, in the model's order.
        union_sparsity: Share of the experts that no token of a batch needs, by the batch's rows; 0 to 1.
        draws: The metric on rows drawn anew, with replacement; draw k takes the same rows in every evaluation of as
            many. None of what several processes measured.
        score_histogram: How many scores of each FFN fell in each of 50 bins of [0, 1].
        flops_per_token: FLOPs as the paper counts them (the layers' projections, routers included).
        dense_flops_per_token: FLOPs of the dense model, counted alike.
        bytes_per_token: Bytes that a token moves at batch 1 in bfloat16.
        dense_bytes_per_token: Bytes of the dense model, counted alike.
        bound: How many times as fast as dense the bytes allow at most.
        skipped_rows: How many rows of the data were left out, by the reason.
        cut_answers: How many answers were cut off, by the set.
        others: All else that a task measures, by name: a test's metrics; a fit's further metrics, each by view.
    """

    sparsity: float | None = None
    sparsity_per_layer: list[float] | None = None
    union_sparsity: dict[str, float] | None = None
    draws: list[float | None] | None = None
    score_histogram: list[list[int]] | None = None
    flops_per_token: float | None = None
    dense_flops_per_token: float | None = None
    bytes_per_token: float | None = None
    dense_bytes_per_token: float | None = None
    bound: float | None = None
    skipped_rows: dict[str, int] | None = None
    cut_answers: dict[str, int] | None = None
    others: dict[str, Any] = field(default_factory=dict)

    always: ClassVar[tuple[str, ...]] = ()  # keys that the file has even where their value is None

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """Returns the record of a mapping as its file holds it; the types are not looked at."""
        known = {each.name for each in fields(cls)} - {"others"}
        others = {key: value for key, value in content.items() if key not in known}
        return cls(**{key: value for key, value in content.items() if key in known}, others=others)

    def content(self) -> dict[str, Any]:
        """Returns the content of the file: one mapping, with the keys of `others` beside the fields."""
        own = type(self).__annotations__
        names = sorted((each.name for each in fields(self)), key=lambda name: name not in own)
        values = {name: getattr(self, name) for name in names if name != "others"}
        return {key: value for key, value in values.items() if value is not None or key in self.always} | self.others

    def write(self, file: Path) -> None:
        """Writes the file, whole or not at all."""
        write_json(file, self.content())


@dataclass(kw_only=True)
class Results(Evaluation):
    """The results of a fit (``results.json``). A value that was not measured, or is not defined, is None.

    Sparsity, FLOPs and bytes are those of ``hard``, or of ``hard_before`` where the expert stage was not run.

    Attributes:
        task: Name of the task.
        metric: Name of the metric, whose values the views and the floor are.
        data: Where the rows came from.
        dense: The metric on the validation rows with every expert, before any routing.
        soft: The metric after the router stage, with every expert weighted by its score.
        hard_before: The metric with the selected experts alone, before the model was adapted to them.
        hard: The metric with the selected experts alone, after the expert stage.
        floor: The metric with every expert off, adapted alike.
        sparsity_before: The sparsity of ``hard_before``; 0 to 1.
        target_sparsity: The sparsity that was asked for; 0 to 1.
        grouping: Inertia of the grouping, and that of a random one.
        seconds_per_stage: Seconds that each stage, and the grouping, took.
        latency_ms: Milliseconds of a call of the sparse model.
        dense_latency_ms: Milliseconds of a call of its dense twin.
        speedup: Dense time by sparse time.
        latency_of: What was timed: the call, its rows and real tokens, the type, the device, its threads and the
            machine's load.
        title: What people call the data, where its module knows that.
        options: What was chosen, by dotted names (see `choices`); of the fit whose model this one started from
            with ``start.`` before them.
        seed: The ``seed_everything`` of the fit.
        versions: Packages, device and machine.
    """

    task: str
    data: str | None = None
    metric: str
    dense: float | None
    soft: float | None = None
    hard_before: float | None
    hard: float | None
    sparsity: float | None = field()  # in a fit's file, unlike in a test's, this and the next ones are always there
    sparsity_before: float | None = None
    target_sparsity: float | None = None
    sparsity_per_layer: list[float] | None = field()
    flops_per_token: float = field()
    dense_flops_per_token: float = field()
    grouping: dict[str, float] | None = None
    seconds_per_stage: dict[str, float] = field(default_factory=dict)
    seed: int
    versions: dict[str, Any] = field(default_factory=dict)
    floor: float | None = None
    latency_ms: float | None = None
    dense_latency_ms: float | None = None
    speedup: float | None = None
    latency_of: dict[str, Any] | None = None
    title: str | None = None
    options: dict[str, Any] | None = None

    always: ClassVar[tuple[str, ...]] = (
        *("data", "dense", "soft", "hard_before", "hard", "sparsity", "sparsity_before", "sparsity_per_layer"),
        *("union_sparsity", "grouping"),
    )

    @property
    def expert_stage_ran(self) -> bool:
        """Whether the fit reached its expert stage, so that ``hard`` is a value or undefined."""
        return "expert" in self.seconds_per_stage

    @property
    def final_view(self) -> View:
        """The view that the fit has come to, even where its value is not defined: no other says the same.

        That is ``hard`` if the expert stage ran, else ``hard_before``, or ``dense`` of a fit that selected nothing.
        """
        if self.hard is not None or self.expert_stage_ran:
            return "hard"
        return "dense" if self.hard_before is None and self.sparsity is None else "hard_before"

    @property
    def value(self) -> float | None:
        """The metric in `final_view`."""
        return {"dense": self.dense, "hard_before": self.hard_before, "hard": self.hard}[self.final_view]

    @property
    def span_kept(self) -> float | None:
        """(value - floor) / (dense - floor), or None where it means nothing.

        ``dense`` is the model that the fit started from, which was not trained on as long as it.
        """
        dense, floor, value = self.dense, self.floor, self.value
        if self.final_view == "dense" or dense is None or value is None or floor is None:
            return None
        return (value - floor) / (dense - floor) if better(self.metric, dense, floor) else None

    def metrics(self) -> dict[str, float]:
        """Returns the single values as MLflow's metrics, ``results/dense`` and so on."""
        scalars = {key: value for key, value in self.content().items() if type(value) in (int, float) and key != "seed"}
        scalars |= {f"union_sparsity_{size}": share for size, share in (self.union_sparsity or {}).items()}
        return {f"results/{key}": float(value) for key, value in scalars.items()}

    def describe(self) -> str:
        """Says the values in a few words."""
        values = {"dense": self.dense, "hard": self.hard}
        words = [f"{view} {value:.4f}" for view, value in values.items() if value is not None]
        if self.hard is None and self.expert_stage_ran:
            words.append("hard undefined")
        elif self.hard is None and self.hard_before is not None:
            words.append(f"hard_before {self.hard_before:.4f}")
        if self.sparsity is not None:
            words.append(f"sparsity {100 * self.sparsity:.1f} %")
        return f"{self.metric}: {', '.join(words)}"


# What a search may judge a fit by: its single values, the second three only where a fit measures its latency
OBJECTIVES = (
    *("dense", "soft", "hard_before", "hard", "value", "floor", "span_kept"),
    *("sparsity", "sparsity_before", "flops_per_token", "bytes_per_token", "bound"),
    *("dense_flops_per_token", "dense_bytes_per_token"),
)
MEASURED = ("speedup", "latency_ms", "dense_latency_ms")


@dataclass(frozen=True)
class Place:
    """Progress of a running fit (``progress.json`` in its run folder).

    Attributes:
        stage: The stage that trains.
        epoch: Its epoch, from 1.
        epochs: How many epochs the stage has.
        done: How many epochs of the fit are done.
        total: How many epochs the fit has.
    """

    stage: str
    epoch: int
    epochs: int
    done: int
    total: int

    def write(self, run: Path) -> None:
        """Writes the file into a run folder."""
        write_json(run / PROGRESS, asdict(self))

    @staticmethod
    def read(run: Path) -> "Place | None":
        """Returns a run's progress; None without a readable file, because only the display needs it."""
        try:
            return Place(**read_json(run / PROGRESS))
        except (OSError, ValueError, TypeError):
            return None


def read_results(run: Path) -> Results:
    """Returns a run's ``results.json``.

    Raises:
        UserError: If it is missing or damaged, or a field is missing or of another type.
    """
    way_out = "use the version that wrote it, or leave this run out"
    try:
        return read(Results, run / FILE, way_out)
    except OSError as error:
        raise UserError(f"{run} has no {FILE}: its fit was not finished, or it is no run folder") from error


def read_evaluation(file: Path) -> Evaluation:
    """Returns a ``test.json``.

    Raises:
        UserError: If it is damaged, or a field is of another type.
        OSError: If it cannot be read.
    """
    return read(Evaluation, file, "test the run again, or remove it")


def read(kind: type[Record], file: Path, way_out: str) -> Record:
    """Returns a record from its file, with every field of its type.

    Args:
        kind: The record's type.
        file: The file.
        way_out: What to do about one that cannot be read; the error's last words.

    Raises:
        UserError: If the file is damaged, or a field is missing or of another type.
        OSError: If it cannot be read.
    """
    from pydantic import ValidationError

    other = "is damaged, or was written by another version of lte-lightning"
    content = read_json(file, way_out, parse_constant=lambda name: None if name == "NaN" else float(name))
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if lacking := [name for name in needed if name not in content]:
        raise UserError(f"{file} {other}: {lacking[0]} is not there; {way_out}")
    record = kind.of(content)
    try:
        _adapter(kind).validate_json(json.dumps(vars(record)), strict=True)  # type: ignore[arg-type] # types have hashes
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} {other}: {field} is {abridged(first['input'])}: {first['msg']}; {way_out}") from error
    return record


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # at the first file that is read: a tenth of a second

    return TypeAdapter(kind)

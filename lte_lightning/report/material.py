"""What a report is made of: runs, their settings, and what they are read against."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lte_lightning.core.model.families import reads_first_token
from lte_lightning.report.methods import Lte, describe, marked
from lte_lightning.report.missing import Missing
from lte_lightning.results import Results, better

GFLOP = 2**30  # as the paper counts
UNTRAINED = "dense, not trained on"


@dataclass
class Run:
    """One finished fit.

    Args:
        folder: Its run folder.
        name: Its point's name in a sweep, or that of its MLflow run.
        method: The sweep's variant, or the name of the selector.
        role: ``point``, or what points shared: ``start`` (dense fine-tuning) or ``floor``.
        parameters: What tells it from the method's other runs, seeds apart.
        results: Its ``results.json``.
        histogram: How many scores of each layer fell in each bin of [0, 1]; empty if there were none.
        command: The command that ran it.
        options: Its configuration, flat, without what differs between runs that are the same but for the seed.
        lte: What its ``lte_config.json`` says of its selection.
        family: The ``model_type`` of its model, if known.
        test: The file of the test that its figures are of; None of the fit's own.
        task: The experiment that it belongs to: task, metric and model, by the shortest name that tells them apart.
        span_kept: What it keeps of the span from floor to dense, with those of its seed in the report.
    """

    folder: Path
    name: str | None
    method: str
    role: str
    parameters: dict[str, Any]
    results: Results
    histogram: list[list[int]]
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    lte: Lte = field(default_factory=dict)
    family: str | None = None
    test: str | None = None
    task: str = ""
    span_kept: float | None = None

    @property
    def seed(self) -> int:
        """The ``seed_everything`` of the fit."""
        return self.results.seed

    @property
    def sparsity(self) -> float:
        """Share of the FFN neurons that do not run; 0 where nothing was selected."""
        return self.results.sparsity or 0.0

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model, trained on like the methods: an expert stage in which every expert ran."""
        trained = self.results.hard is not None or self.results.expert_stage_ran
        # LTE's soft stage, and gates that scale what an expert gives, are not dense even with all experts
        routed = describe(self.lte).learns_with_task
        return self.role == "point" and self.results.sparsity == 0 and trained and not routed

    @property
    def is_undefined(self) -> bool:
        """Whether its figure is not defined, such as a correlation of constant predictions."""
        return self.role == "point" and self.results.value is None

    @property
    def inner_sparsity(self) -> float | None:
        """Sparsity without the last layer, where a classifier reads one token of that; else None."""
        layers = self.results.sparsity_per_layer
        classifies = str(self.options.get("model.class_path")).endswith("Classification")
        reads_one = classifies and reads_first_token(self.family)
        return statistics.fmean(layers[:-1]) if reads_one and layers and len(layers) > 1 else None

    @property
    def trained_on(self) -> str | None:
        """How long the model was trained on after the dense stage, such as ``2 epochs``; None if nothing says so."""
        stages = ("router", "expert") if describe(self.lte).learns_with_task else ("expert",)
        total: Counter[str] = Counter()
        for stage in stages:
            epochs, steps = (self.options.get(f"stages.{stage}.{unit}") for unit in ("epochs", "steps"))
            if epochs is None:
                return None
            unit, length = ("epoch", epochs) if steps is None else ("step", steps)
            total[unit] += length if epochs else 0
        told = [f"{count} {unit}{'s' * (count != 1)}" for unit, count in total.items() if count]
        return " and ".join(told) or "0 epochs"

    def better(self, one: float, other: float) -> bool:
        """Says whether a figure of its metric is better than another."""
        return better(self.results.metric, one, other)


@dataclass
class Setting:
    """The runs of one method with the same parameters, one per seed."""

    task: str
    metric: str
    method: str
    parameters: dict[str, Any]
    runs: list[Run]

    def values(self, key: str | Callable[[Run], Any]) -> list[Any]:
        """Returns a result of every run that has it.

        Args:
            key: A field of `Results` or ``span_kept``, or what gives it of a run.

        Of ``value`` and ``span_kept`` there are none if that of a seed is not defined: a mean over the others flatters.
        """
        if self.undefined and key in ("value", "span_kept"):
            return []
        read = key if callable(key) else lambda run: getattr(run if key == "span_kept" else run.results, key)
        found = [read(run) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, key: str | Callable[[Run], float | None]) -> float | None:
        """Returns the mean over the seeds, None if no run has the figure."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def lost(self, dense: dict[int, float]) -> list[float]:
        """Returns what each run lost of its own seed's dense figure."""
        sign = 1 if better(self.metric, 1, 0) else -1
        pairs = [(dense[run.seed], run.results.value) for run in self.runs if run.seed in dense]
        return [sign * (reference - value) for reference, value in pairs if value is not None]

    @property
    def seeds(self) -> list[int]:
        """The seeds, each of one run."""
        return sorted(run.seed for run in self.runs)

    @property
    def undefined(self) -> list[int]:
        """The seeds whose figure is not defined."""
        return sorted(run.seed for run in self.runs if run.is_undefined)

    @property
    def sparsity(self) -> float:
        """Mean sparsity over the seeds."""
        return statistics.fmean(run.sparsity for run in self.runs)

    @property
    def called(self) -> str:
        """The name of its method; an oracle is said to be one, whatever a sweep has named it."""
        lte = self.runs[0].lte
        return marked(self.method, lte) if describe(lte).oracle else self.method

    @property
    def label(self) -> str:
        """The parameters in a few words: each by the end of its name, as long as tells it from the others."""
        words = []
        for key, value in self.parameters.items():
            parts, others = key.split("."), [f".{other}" for other in self.parameters if other != key]
            least = 2 if parts[0] == "stages" else 1  # epochs of which stage
            ends = [".".join(parts[i:]) for i in range(len(parts) - least, -1, -1)]
            name = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), key)
            words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(words) or "–"


@dataclass
class Material:
    """All that a report is made of.

    Args:
        runs: The runs that count.
        bench: Rows of ``lte bench``.
        missing: Points of sweeps that are not done.
        left_out: Names of runs that were found and do not count, each with why.
        about: What the sweeps say of themselves.
        typed: The sweeps' commands, each with the folder where it was typed.
    """

    runs: list[Run] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    typed: list[tuple[str, str]] = field(default_factory=list)

    def settings(self, task: str | None = None, dense: bool = False) -> list[Setting]:
        """Returns the points by method and parameters, each method's in the order of sparsity.

        Args:
            task: One of `tasks`; by default all.
            dense: The dense models that were trained on, instead of the methods.
        """
        found: dict[tuple[str, ...], Setting] = {}
        for run in self.of(task):
            if run.role == "point" and run.is_dense == dense:
                names = run.task, run.results.metric, run.method
                found.setdefault(setting_key(run), Setting(*names, run.parameters, [])).runs.append(run)
        methods = list(dict.fromkeys(setting.method for setting in found.values()))
        return sorted(found.values(), key=lambda s: (s.task, methods.index(s.method), s.sparsity))

    def of(self, task: str | None) -> list[Run]:
        """Returns the runs of one of `tasks`."""
        return [run for run in self.runs if task in (None, run.task)]

    @property
    def fits(self) -> list[Run]:
        """Each fit once, without what tests have found of it."""
        return [run for run in self.runs if run.test is None]

    @property
    def tasks(self) -> dict[str, str]:
        """The experiments, a task, metric and model each, with their metrics."""
        return {run.task: run.results.metric for run in self.runs}

    def dense(self, task: str) -> dict[int, float]:
        """Returns what is dense for each seed: the start, or the model that was trained on, whichever is better."""
        return _best(self._starts(task) + self._trained(task))

    def floor(self, task: str) -> dict[int, float]:
        """Returns the floor of each seed, the best if there are several."""
        return _best((run, run.results.floor) for run in self.of(task))

    def reference(self, task: str, key: str) -> list[float]:
        """Returns the dense figure (``dense``), or the ``floor``, of each seed."""
        return list((self.dense(task) if key == "dense" else self.floor(task)).values())

    def dense_kind(self, task: str) -> str:
        """Says which dense figures `dense` took."""
        dense, found = self.dense(task), _best(self._trained(task))
        others = [str(seed) for seed, value in dense.items() if found.get(seed) != value]
        if len(others) == len(dense):
            return UNTRAINED
        which = f"seed{'s' * (len(others) > 1)} {', '.join(others)}"
        own = dict.fromkeys(filter(None, (run.trained_on for run, _ in self._trained(task))))
        trained = f"dense, trained on{self._compared(task, own, ' as long as the others')}"
        return f"{trained}, or {UNTRAINED}, where that is better or the only one ({which})" if others else trained

    def lengths(self, task: str) -> dict[str, list[str]]:
        """Returns how long models were trained on, as far as is known, each with the methods; the floor is one."""
        found: dict[str, list[str]] = {}
        for run in self.of(task):
            name = "floor" if run.role == "floor" else run.method
            if run.role != "start" and run.trained_on and name not in found.setdefault(run.trained_on, []):
                found[run.trained_on].append(name)
        return found

    def floor_kind(self, task: str) -> str:
        """Says how the floor was adapted."""
        own = [length for length, methods in self.lengths(task).items() if "floor" in methods]
        return f"adapted{self._compared(task, own, ' alike')}"

    def _compared(self, task: str, own: Iterable[str], alike: str) -> str:
        """Says that a length is that of all others, or which it is if they differ; nothing where none is known."""
        if len(self.lengths(task)) == 1:
            return alike
        return f" for {' or '.join(own)}" if own else ""

    def starts(self, task: str) -> list[float]:
        """Returns the dense figure of each seed before anything was trained on, the best of several starts."""
        return list(_best(self._starts(task)).values())

    def _starts(self, task: str) -> list[tuple[Run, float | None]]:
        return [(run, run.results.dense) for run in self.of(task)]

    def _trained(self, task: str) -> list[tuple[Run, float | None]]:
        return [(run, run.results.hard) for run in self.of(task) if run.is_dense]


def setting_key(run: Run) -> tuple[str, ...]:
    """Returns what the runs of one setting have in common."""
    return run.task, run.method, json.dumps(run.parameters, sort_keys=True, default=str)


def _best(found: Iterable[tuple[Run, float | None]]) -> dict[int, float]:
    best: dict[int, float] = {}
    for run, value in found:
        if value is not None and (run.seed not in best or run.better(value, best[run.seed])):
            best[run.seed] = value
    return dict(sorted(best.items()))

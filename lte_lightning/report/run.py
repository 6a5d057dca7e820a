"""A finished fit as the report uses it, and a setting: the fits that differ only in the seed."""

import json
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lte_lightning.core.model.families import reads_first_token
from lte_lightning.report.methods import Lte, describe, marked
from lte_lightning.results import Results, better
from lte_lightning.sweep.table import mean_text, span_text

GFLOP = 2**30  # as the paper counts


@dataclass
class Run:
    """A finished fit.

    Args:
        folder: Its run folder.
        name: Name of its point in a sweep, or of its MLflow run.
        method: The sweep's variant, or the name of the selector.
        role: ``point``, or a fit that points share: ``start`` (dense fine-tuning) or ``floor``.
        parameters: The parameters that distinguish it from the method's other runs, except the seed.
        results: Its ``results.json``.
        histogram: Number of scores of each layer in each bin of [0, 1]; empty without scores.
        command: The command that ran it.
        options: Its configuration, flat, without options that differ between repetitions of the same fit.
        lte: The selection settings in its ``lte_config.json``.
        family: The ``model_type`` of its model, if known.
        test: The file of the test that its results are from; None for the fit's own results.
        task: Its experiment: task, metric and model, in the shortest name that tells experiments apart.
        title: The experiment's title for people, such as ``STS-B, MiniLM (6 layers)``.
        span_kept: Share of the span from floor to dense that it keeps, by the floor and the dense model of its seed.
        lost: Loss against its seed's dense value; negative if it is better.
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
    title: str = ""
    span_kept: float | None = None
    lost: float | None = None

    @property
    def seed(self) -> int:
        """The ``seed_everything`` of the fit."""
        return self.results.seed

    @property
    def sparsity(self) -> float:
        """Share of the FFN neurons that do not run; 0 without selection."""
        return self.results.sparsity or 0.0

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model trained further like the methods: an expert stage in which every expert ran."""
        trained = self.results.hard is not None or self.results.expert_stage_ran
        # LTE's soft stage, and gates that scale experts, are not dense even with all experts
        routed = describe(self.lte).learns_with_task
        return self.role == "point" and self.results.sparsity == 0 and trained and not routed

    @property
    def is_undefined(self) -> bool:
        """Whether its value is undefined, such as a correlation of constant predictions."""
        return self.role == "point" and self.results.value is None

    @property
    def flops_share(self) -> float | None:
        """FLOPs of a token as a share of the dense model's."""
        dense = self.results.dense_flops_per_token
        return self.results.flops_per_token / dense if dense else None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens per second of the sparse model, measured by its fit."""
        return self._speed(self.results.latency_ms)

    @property
    def dense_tokens_per_second(self) -> float | None:
        """Real tokens per second of its dense twin."""
        return self._speed(self.results.dense_latency_ms)

    def _speed(self, ms: float | None) -> float | None:
        tokens = (self.results.latency_of or {}).get("tokens")  # an earlier version did not count them
        return 1000 * tokens / ms if tokens and ms else None

    @property
    def inner_sparsity(self) -> float | None:
        """Sparsity without the last layer, if a classifier reads only one token of that layer; else None."""
        layers = self.results.sparsity_per_layer
        classifies = str(self.options.get("model.class")).endswith("Classification")
        reads_one = classifies and reads_first_token(self.family)
        return statistics.fmean(layers[:-1]) if reads_one and layers and len(layers) > 1 else None

    @property
    def trained_on(self) -> str | None:
        """Length of the training after the dense stage, such as ``2 epochs``; None if unknown."""
        stages = ("router", "expert") if describe(self.lte).learns_with_task else ("expert",)
        total: Counter[str] = Counter()
        for stage in stages:
            epochs, steps = (self.options.get(f"stages.{stage}.{unit}") for unit in ("epochs", "steps"))
            if epochs is None:
                return None
            unit, length = ("epoch", epochs) if steps is None else ("step", steps)
            total[unit] += length if epochs else 0
        lengths = [f"{count} {unit}{'s' * (count != 1)}" for unit, count in total.items() if count]
        return " and ".join(lengths) or "0 epochs"

    def better(self, one: float, other: float) -> bool:
        """Whether a value of its metric is better than another."""
        return better(self.results.metric, one, other)


@dataclass
class Setting:
    """The runs of one method with the same parameters, one per seed."""

    task: str
    metric: str
    method: str
    parameters: dict[str, Any]
    runs: list[Run]

    def values(self, key: str) -> list[Any]:
        """Returns the values of ``key``, a field of `Run` or of its `Results`, of every run that has one.

        ``value``, ``lost`` and ``span_kept`` have no values if a seed's value is undefined: a mean over the other
        seeds would look too good.
        """
        if self.undefined and key in ("value", "lost", "span_kept"):
            return []
        values = [getattr(run if hasattr(run, key) else run.results, key) for run in self.runs]
        return [value for value in values if value is not None]

    def mean(self, key: str) -> float | None:
        """Returns the mean over the seeds, None if no run has a value."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    @property
    def seeds(self) -> list[int]:
        """The seeds, each of one run."""
        return sorted(run.seed for run in self.runs)

    @property
    def undefined(self) -> list[int]:
        """The seeds whose value is undefined."""
        return sorted(run.seed for run in self.runs if run.is_undefined)

    @property
    def sparsity(self) -> float:
        """Mean sparsity over the seeds."""
        return statistics.fmean(run.sparsity for run in self.runs)

    @property
    def figure(self) -> str:
        """Its value as text, with the seeds for which it is undefined."""
        if len(self.undefined) == len(self.runs):
            return "undefined"
        seeds = f" (undefined: seed {', '.join(map(str, self.undefined))})" if self.undefined else ""
        return mean_text([run.results.value for run in self.runs]) + seeds

    @property
    def kept(self) -> str:
        """The share of the span from floor to dense that it keeps, as text."""
        return span_text([run.span_kept for run in self.runs])

    @property
    def gains(self) -> bool:
        """Whether it is better than the dense model, by the mean over its seeds."""
        return (self.mean("lost") or 0) < 0

    @property
    def reads_one_token(self) -> bool:
        """Whether the model's last layer is read at one token only; it then has an ``inner_sparsity``."""
        return bool(self.values("inner_sparsity"))

    @property
    def called(self) -> str:
        """The name of its method. An oracle is marked as such, whatever the sweep calls it."""
        lte = self.runs[0].lte
        return marked(self.method, lte) if describe(lte).oracle else self.method

    @property
    def label(self) -> str:
        """The parameters in a few words, each by the shortest end of its name that is unique."""
        words = []
        for key, value in self.parameters.items():
            parts, rivals = key.split("."), [f".{rival}" for rival in self.parameters if rival != key]
            least = 2 if parts[0] == "stages" else 1  # epochs of which stage
            ends = [".".join(parts[i:]) for i in range(len(parts) - least, -1, -1)]
            name = next((end for end in ends if not any(rival.endswith(f".{end}") for rival in rivals)), key)
            words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(words) or "–"


def setting_key(run: Run) -> tuple[str, ...]:
    """Returns the key that the runs of a setting share."""
    return run.task, run.method, json.dumps(run.parameters, sort_keys=True, default=str)

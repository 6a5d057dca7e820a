"""One finished fit as a report knows it, and the fits of one setting over the seeds."""

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
        title: The same for people, such as ``STS-B, MiniLM (6 layers)``.
        span_kept: What it keeps of the span from floor to dense, with those of its seed in the report.
        lost: What it lost of its seed's dense figure; negative where it is better.
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
    def flops_share(self) -> float | None:
        """FLOPs of a token as a share of the dense model's."""
        dense = self.results.dense_flops_per_token
        return self.results.flops_per_token / dense if dense else None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens that the sparse model computes in a second, as its fit has measured."""
        return self._speed(self.results.latency_ms)

    @property
    def dense_tokens_per_second(self) -> float | None:
        """The same of its dense twin."""
        return self._speed(self.results.dense_latency_ms)

    def _speed(self, ms: float | None) -> float | None:
        tokens = (self.results.latency_of or {}).get("tokens")  # an earlier version did not count them
        return 1000 * tokens / ms if tokens and ms else None

    @property
    def inner_sparsity(self) -> float | None:
        """Sparsity without the last layer, if a classifier reads one token of that layer alone; else None."""
        layers = self.results.sparsity_per_layer
        classifies = str(self.options.get("model.class")).endswith("Classification")
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

    def values(self, key: str) -> list[Any]:
        """Returns what every run that has it has of ``key``, a field of `Run` or of its `Results`.

        Of ``value``, ``lost`` and ``span_kept`` there are none if the figure of a seed is not defined: a mean over the
        others flatters.
        """
        if self.undefined and key in ("value", "lost", "span_kept"):
            return []
        found = [getattr(run if hasattr(run, key) else run.results, key) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, key: str) -> float | None:
        """Returns the mean over the seeds, None if no run has the figure."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

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
    def figure(self) -> str:
        """Its figure as text, with the seeds for which it is not defined."""
        if len(self.undefined) == len(self.runs):
            return "undefined"
        seeds = f" (undefined: seed {', '.join(map(str, self.undefined))})" if self.undefined else ""
        return mean_text([run.results.value for run in self.runs]) + seeds

    @property
    def kept(self) -> str:
        """What it keeps of the span from floor to dense, as text."""
        return span_text([run.span_kept for run in self.runs])

    @property
    def gains(self) -> bool:
        """Whether it is better than the dense figures, by mean over its seeds."""
        return (self.mean("lost") or 0) < 0

    @property
    def reads_one_token(self) -> bool:
        """Whether the model's last layer is read at one token alone; then it has an ``inner_sparsity``."""
        return bool(self.values("inner_sparsity"))

    @property
    def called(self) -> str:
        """The name of its method. An oracle is marked as one, whatever the sweep calls it."""
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


def setting_key(run: Run) -> tuple[str, ...]:
    """Returns what the runs of one setting have in common."""
    return run.task, run.method, json.dumps(run.parameters, sort_keys=True, default=str)

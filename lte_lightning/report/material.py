"""The material of a report: the runs that count, their references, and what is missing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lte_lightning.bench.rates import Rate
from lte_lightning.report.methods import RIVALS, describe
from lte_lightning.report.missing import Missing
from lte_lightning.report.run import Run, Setting, setting_key
from lte_lightning.results import better

UNTRAINED = "dense, not trained on"
# Options with which a fit sees a part of the rows
PARTS = ("data.train_rows", "trainer.limit_train_batches", "trainer.limit_val_batches")
Pairs = Iterable[tuple[Run, float | None]]


@dataclass
class Material:
    """All material of a report.

    Args:
        runs: The runs that count.
        bench: Rows of ``lte bench``.
        curves: Points of ``lte curve``, by file.
        rates: Rows of ``lte bench`` for whole models, each with its file.
        missing: Points of sweeps that are not done.
        left_out: Names of runs that do not count, each with the reason.
        about: The descriptions in the sweep files.
        typed: The sweeps' commands, each with the folder where it was typed.
    """

    runs: list[Run] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rates: list[tuple[str, Rate]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    typed: list[tuple[str, str]] = field(default_factory=list)

    def settings(self, task: str | None = None, dense: bool = False) -> list[Setting]:
        """Returns the points by method and parameters, each method's in the order of sparsity.

        Args:
            task: One of `tasks`; by default all.
            dense: Return the dense models that were trained further, in place of the methods.
        """
        settings: dict[tuple[str, ...], Setting] = {}
        for run in self.of(task):
            if run.role == "point" and run.is_dense == dense:
                names = run.task, run.results.metric, run.method
                settings.setdefault(setting_key(run), Setting(*names, run.parameters, [])).runs.append(run)
        methods = list(dict.fromkeys(setting.method for setting in settings.values()))
        return sorted(settings.values(), key=lambda s: (s.task, methods.index(s.method), s.sparsity))

    def methods(self, task: str | None = None) -> dict[str, list[Setting]]:
        """Returns the settings of each method, in the order of `settings`."""
        methods: dict[str, list[Setting]] = {}
        for setting in self.settings(task):
            methods.setdefault(setting.method, []).append(setting)
        return methods

    def of(self, task: str | None) -> list[Run]:
        """Returns the runs of one of `tasks`."""
        return [run for run in self.runs if task in (None, run.task)]

    @property
    def fits(self) -> list[Run]:
        """Each fit once, without the results of its tests."""
        return [run for run in self.runs if run.test is None]

    @property
    def tasks(self) -> dict[str, str]:
        """The experiments (task, metric and model) with their metrics."""
        return {run.task: run.results.metric for run in self.runs}

    def title(self, task: str) -> str:
        """Returns the title of an experiment."""
        return next(run.title for run in self.runs if run.task == task)

    # References of the points

    def dense(self, task: str) -> dict[int, float]:
        """Returns each seed's dense value: the start's or that of the model trained further, whichever is better."""
        return _best([*self._starts(task), *self._trained(task)])

    def floor(self, task: str) -> dict[int, float]:
        """Returns the floor of each seed, the best if there are several."""
        return _best((run, run.results.floor) for run in self.of(task))

    def floor_loss(self, task: str) -> float | None:
        """Returns what the floor loses against the dense value of its seed, in the mean; None if no seed has both."""
        dense, floor = self.dense(task), self.floor(task)
        sign = -1 if better(self.tasks[task], 0.0, 1.0) else 1
        lost = [sign * (dense[seed] - floor[seed]) for seed in dense if seed in floor]
        return sum(lost) / len(lost) if lost else None

    def reference(self, task: str, key: str) -> list[float]:
        """Returns the ``dense`` value or the ``floor`` of each seed."""
        return list((self.dense(task) if key == "dense" else self.floor(task)).values())

    def starts(self, task: str) -> list[float]:
        """Returns the dense value of each seed before further training, the best if there are several starts."""
        return list(_best(self._starts(task)).values())

    def _starts(self, task: str) -> Pairs:
        return [(run, run.results.dense) for run in self.of(task)]

    def _trained(self, task: str) -> Pairs:
        return [(run, run.results.hard) for run in self.of(task) if run.is_dense]

    def own_starts(self, task: str) -> list[tuple[list[str], list[float]]]:
        """Returns the groups of methods that share a dense start, each with that start's values over the seeds."""
        groups: list[tuple[list[str], dict[int, float]]] = []
        for run in self.of(task):
            if run.role != "point" or (start_value := run.results.dense) is None:
                continue
            alike = [group for group in groups if abs(group[1].get(run.seed, float("inf")) - start_value) <= 1e-9]
            alike += [group for group in groups if run.method in group[0] and run.seed not in group[1]]
            if not alike:
                groups.append(([], {}))
            methods, values = alike[0] if alike else groups[-1]
            methods += [] if run.method in methods else [run.method]
            values.setdefault(run.seed, start_value)
        return [(methods, list(values.values())) for methods, values in groups]

    def dense_kind(self, task: str) -> str:
        """Describes the dense values that `dense` returns."""
        dense, trained = self.dense(task), _best(self._trained(task))
        untrained = [str(seed) for seed, value in dense.items() if trained.get(seed) != value]
        if len(untrained) == len(dense):
            return UNTRAINED
        lengths = dict.fromkeys(filter(None, (run.trained_on for run, _ in self._trained(task))))
        kind = f"dense, trained on{self._compared(task, lengths, ' as long as the others')}"
        which = f"seed{'s' * (len(untrained) > 1)} {', '.join(untrained)}"
        return f"{kind}, or {UNTRAINED} if that is better or the only value ({which})" if untrained else kind

    def floor_kind(self, task: str) -> str:
        """Describes how the floor was adapted."""
        lengths = [length for length, methods in self.lengths(task).items() if "floor" in methods]
        return f"adapted{self._compared(task, lengths, ' alike')}"

    def lengths(self, task: str) -> dict[str, list[str]]:
        """Returns the methods (and the floor) by the length of their further training, as far as known."""
        lengths: dict[str, dict[str, None]] = {}
        for run in self.of(task):
            if run.role != "start" and run.trained_on:
                name = "floor" if run.role == "floor" else run.method
                lengths.setdefault(run.trained_on, {})[name] = None
        return {length: list(methods) for length, methods in lengths.items()}

    def _compared(self, task: str, lengths: Iterable[str], alike: str) -> str:
        """Returns ``alike`` if all lengths are equal, else the reference's own length; "" if no length is known."""
        if len(self.lengths(task)) == 1:
            return alike
        return f" for {' or '.join(lengths)}" if lengths else ""

    # What is missing

    def absent(self) -> list[tuple[str, list[str]]]:
        """Returns the compared methods without results: first on all tasks, then on single tasks."""

        def lacking(task: str | None) -> list[str]:
            points = [run for run in self.of(task) if run.role == "point" and not run.is_dense]
            return [name for name in RIVALS if name not in {describe(run.lte).rival for run in points}]

        everywhere = lacking(None)
        of_tasks = [
            (f"on {self.title(task)} ", [name for name in lacking(task) if name not in everywhere])
            for task in self.tasks
        ]
        return [(place, names) for place, names in [("", everywhere), *of_tasks] if names]

    def parts(self) -> Counter[tuple[str, str]]:
        """Counts the fits that saw only a part of the rows, by option and value."""
        values = [
            (key, str(run.options[key])) for key in PARTS for run in self.fits if run.options.get(key) is not None
        ]
        return Counter(pair for pair in values if pair[1] != "1.0")  # of batches 1.0 are all, and 1 is one

    def unfinished(self) -> dict[tuple[str, str, str], dict[tuple[int, ...], list[str]]]:
        """Returns the points that are not done, by sweep, method and status: parameters by seeds."""
        seeds: dict[tuple[str, str, str, str], set[int]] = {}
        for point in self.missing:
            key = point.sweep, point.method, point.status, point.parameters
            seeds.setdefault(key, set()).update([] if point.seed is None else [point.seed])
        groups: dict[tuple[str, str, str], dict[tuple[int, ...], list[str]]] = {}
        for (*names, parameters), numbers in seeds.items():
            sweep, method, status = names
            groups.setdefault((sweep, method, status), {}).setdefault(tuple(sorted(numbers)), []).append(parameters)
        return groups

    def reasons(self) -> dict[str, list[str]]:
        """Returns the names of the runs that do not count, by reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        return reasons


def _best(pairs: Pairs) -> dict[int, float]:
    best: dict[int, float] = {}
    for run, value in pairs:
        if value is not None and (run.seed not in best or run.better(value, best[run.seed])):
            best[run.seed] = value
    return dict(sorted(best.items()))

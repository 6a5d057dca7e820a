"""Points that Optuna proposes."""

import math
import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.files import markdown_table, write_text
from lte_lightning.results import Results
from lte_lightning.store import reason, shown
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point, Sweep

FOLDER = "lte folder"  # marks the trials of one sweep's folder, by its id, in a storage that several share


class Trials:
    """The trials of a search: each is one fit per seed, judged by the mean of their results.

    The study lives in Optuna's storage, by default a database in the sweep's folder. Several sweeps, each in a folder
    of its own, may share one storage and study: together they run the number of trials that the file asks for. A sweep
    resumes the trials that a killed sweep of the same folder left. It waits for a busy storage.

    Args:
        sweep: With a search.
        folder: The sweep's folder, held.
        patience: Seconds to wait for a busy storage.

    Raises:
        UserError: If Optuna is not installed, cannot draw from the ranges, or its storage cannot be used.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder, patience: float = 60) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError('a search needs Optuna: pip install "lte-lightning[sweep]"') from error
        self._optuna, self._states = optuna, optuna.trial.TrialState
        assert sweep.search is not None
        self.sweep, self.search, self.patience = sweep, sweep.search, patience
        self._owner: str = folder.about["id"]
        self.storage = self.search.storage or f"sqlite:///{folder.path / 'optuna.db'}"
        self._open: dict[int, dict[str, Results | None]] = {}
        self._trial_of: dict[str, int] = {}
        self._twins: dict[int, list[int]] = {}  # of an open trial, those drawn since that are the same
        self._found: dict[int, list[float] | None] = {}  # what trials were told, None if they failed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._ranges = {key: self._range(limits) for key, limits in self.search.parameters.items()}
        except ValueError as error:
            raise UserError(f"{sweep.path}: Optuna cannot draw from the parameters of search: {error}") from error
        # Nothing runs yet, so giving up soon costs little
        self.study = self._ask_storage(self._open_study, min(patience, 10))
        directions = self._ask_storage(lambda: self.study.directions)
        if [d.name.lower() for d in directions] != list(self.search.objectives.values()):
            raise UserError(
                f"study {self.study.study_name!r} in {shown(self.storage)} has other objectives; name another study"
            )
        self._left_behind = self._ask_storage(self._find_left_behind)

    def _open_study(self) -> Any:
        study = self._optuna.create_study(
            storage=self.storage,
            study_name=self.search.study or self.sweep.path.stem,
            directions=[*self.search.objectives.values()],  # type: ignore[list-item]  # the words were checked
            load_if_exists=True,
        )
        # A sweep that goes on, or shares the study, must not draw the same trials again
        owner = zlib.crc32(self._owner.encode()) if self.search.storage else 0
        seed = (self.search.seed + owner + len(study.get_trials(deepcopy=False))) % 2**32
        study.sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        return study

    def _find_left_behind(self) -> list[Any]:
        resumable = []
        for trial in self._trials(self._states.RUNNING):
            # A storage in the folder holds this sweep's trials alone, even after the folder was moved
            if self.search.storage and trial.user_attrs.get(FOLDER) != self._owner:
                continue
            if trial.params.keys() == self._ranges.keys():
                resumable.append(trial)
            else:  # killed while it was drawn, or drawn from another file's parameters
                self.study.tell(trial.number, state=self._states.FAIL, skip_if_finished=True)
        return resumable

    def _ask_storage(self, ask: Callable[[], Any], patience: float | None = None) -> Any:
        """Uses the storage, and tries again while another process has it."""
        from sqlalchemy.exc import OperationalError

        passing = (self._optuna.exceptions.StorageInternalError, OperationalError, OSError)
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                return ask()
            except Exception as error:  # a damaged database is any error of Optuna's
                if isinstance(error, passing) and time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                raise self._unusable(error, isinstance(error, passing)) from None

    def _unusable(self, error: Exception, may_pass: bool) -> UserError:
        cause = reason(error.__cause__ or error)
        if may_pass:
            way_out = (
                "is it locked by another process, or out of reach? Nothing is lost: wait for it and start the sweep "
                "again, or name another storage in the sweep file"
            )
        elif isinstance(error, ImportError):
            way_out = 'install the driver of that database (for psycopg: pip install "psycopg[binary]")'
        else:
            way_out = f"check storage and study of search in {self.sweep.path}"
        return UserError(f"Optuna's storage {shown(self.storage)} cannot be used: {cause}; {way_out}")

    def _trials(self, *states: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=states)

    def fits_left(self) -> int:
        """Returns how many fits may still be proposed."""
        return max(0, self.search.trials - self._ask_storage(self._begun)) * len(self.sweep.seeds)

    def _begun(self) -> int:
        # A trial that failed while it was drawn does not count
        return sum(
            trial.state != self._states.FAIL or trial.params.keys() >= self._ranges.keys()
            for trial in self._trials(self._states.RUNNING, self._states.COMPLETE, self._states.FAIL)
        )

    def ask(self) -> list[Point]:
        """Returns the points of a new trial or of an interrupted one. The list is empty if all trials have run."""
        while True:
            if self._left_behind:
                trial = self._left_behind.pop(0)
            elif self._ask_storage(self._begun) >= self.search.trials:
                return []
            else:
                trial = self._draw()
            points = self.sweep.trial(trial.params)
            if new := [point for point in points if point.name not in self._trial_of]:
                self._open[trial.number] = {}
                self._trial_of |= {point.name: trial.number for point in new}
                return new
            twin = self._trial_of[points[0].name]
            if twin in self._open:
                self._twins.setdefault(twin, []).append(trial.number)
            else:
                self._judge(trial.number, self._found[twin])

    def _draw(self) -> Any:
        # Each step is tried again by itself: a trial that was begun is not begun twice
        trial = self._ask_storage(self.study.ask)
        self._ask_storage(lambda: trial.set_user_attr(FOLDER, self._owner))
        for key, distribution in self._ranges.items():
            self._ask_storage(partial(self._suggest, trial, key, distribution))
        return trial

    def _suggest(self, trial: Any, key: str, distribution: Any) -> None:
        distributions = self._optuna.distributions
        if isinstance(distribution, distributions.CategoricalDistribution):
            trial.suggest_categorical(key, distribution.choices)
        else:
            suggest = (
                trial.suggest_int if isinstance(distribution, distributions.IntDistribution) else trial.suggest_float
            )
            suggest(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)

    def _range(self, limits: dict[str, Any]) -> Any:
        distributions = self._optuna.distributions
        if "choices" in limits:
            return distributions.CategoricalDistribution(tuple(limits["choices"]))
        whole = all(isinstance(limits.get(key, 1), int) for key in ("low", "high", "step"))
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(**{"step": 1 if whole else None} | limits)

    def _judge(self, number: int, values: list[float] | None) -> None:
        state = self._states.FAIL if values is None else None
        self._ask_storage(lambda: self.study.tell(number, values, state=state, skip_if_finished=True))

    def tell(self, name: str, results: Results | None) -> list[str]:
        """Notes a point's results (None if it failed). The last point of a trial reports the trial to Optuna.

        A trial fails if one of its fits does, or if an objective is undefined in one. Trials that were drawn meanwhile
        and are the same are told the same.

        Returns:
            Lines to print.
        """
        number = self._trial_of[name]
        outcomes = self._open[number]
        outcomes[name] = results
        if len(outcomes) < sum(owner == number for owner in self._trial_of.values()):
            return []
        fits = [fit for fit in outcomes.values() if fit is not None]
        columns = {key: [getattr(fit, key) for fit in fits] for key in self.search.objectives}
        undefined = [objective for objective, column in columns.items() if not all(map(_is_number, column))]
        failed = len(fits) < len(outcomes) or bool(undefined)
        values = None if failed else [statistics.fmean(column) for column in columns.values()]
        twins = self._twins.pop(number, [])
        for judged in (number, *twins):
            self._judge(judged, values)
        self._found[number] = values
        del self._open[number]
        lines = [f"trial {number} failed: its {key} is undefined" for key in undefined]
        return lines + [f"trial {twin} failed: it is the same as trial {number}" for twin in twins if failed]

    def write_front(self, path: Path) -> Path:
        """Writes the Pareto front, the trials that no other beats in all objectives, as a markdown table."""
        keys, objectives = list(self.search.parameters), list(self.search.objectives)
        rows = []
        for trial in self._ask_storage(lambda: self.study.best_trials):
            if not trial.params.keys() >= set(keys):  # a damaged database has lost some
                continue
            drawn = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params[key] for key in keys)]
            rows.append([str(trial.number), *drawn, *(f"{value:.4f}" for value in trial.values)])
        write_text(path, markdown_table(["trial", *keys, *objectives], rows))
        return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

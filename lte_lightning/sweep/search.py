"""Points that Optuna proposes."""

import time
import zlib
from pathlib import Path
from typing import Any

from lte_lightning.core.errors import UserError
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.spec import Point, Sweep

FOLDER = "lte folder"  # marks the trials of one sweep's folder in a storage that several share


class Trials:
    """The trials of a search: each is one fit per seed, and is judged by the mean of their figures.

    The study lives in Optuna's storage, by default a database in the sweep's folder. Several sweeps, each in a folder
    of its own, may share one storage and study: together they run the number of trials that the file asks for. A trial
    that a killed sweep left is taken up again by the sweep of the same folder.

    Args:
        sweep: With a search.
        folder: The sweep's folder, held.

    Raises:
        UserError: If Optuna is not installed, or its storage cannot be used.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError('a search needs Optuna: pip install "lte-lightning[sweep]"') from error
        self._optuna = optuna
        self.sweep, self.search = sweep, sweep.search
        self._place = str(folder.path)
        self.storage = self.search.storage or f"sqlite:///{folder.path / 'optuna.db'}"
        self._open: dict[int, dict[str, dict[str, Any] | None]] = {}
        self._trial_of: dict[str, int] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=self.search.study or sweep.path.stem,
                directions=list(self.search.objectives.values()),
                load_if_exists=True,
            )
            # Neither a sweep that goes on nor another that shares the study draws what was drawn before
            place = zlib.crc32(self._place.encode()) if self.search.storage else 0
            seed = (self.search.seed + place + len(self.study.get_trials(deepcopy=False))) % 2**32
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
            if [d.name.lower() for d in self.study.directions] != list(self.search.objectives.values()):
                raise UserError(
                    f"study {self.study.study_name!r} in {self.storage} has other objectives; name another study"
                )
            self._left_behind = [t for t in self._running() if t.user_attrs.get(FOLDER) == self._place]
        except self._errors() as error:
            raise self._refusal(error) from error

    def _errors(self) -> tuple[type[Exception], ...]:
        from sqlalchemy.exc import SQLAlchemyError

        return (self._optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError, ValueError, ImportError)

    def _refusal(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        return UserError(
            f"Optuna's storage {self.storage} cannot be used: {reason}; is it locked by another process? Wait for it, "
            "or name another storage in the sweep file"
        )

    def _running(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,))

    def left(self) -> int:
        """Returns how many fits may still be proposed."""
        return max(0, self.search.trials - self._begun()) * len(self.sweep.seeds)

    def _begun(self) -> int:
        states = self._optuna.trial.TrialState
        return len(self.study.get_trials(deepcopy=False, states=(states.RUNNING, states.COMPLETE, states.FAIL)))

    def ask(self) -> list[Point]:
        """Returns the points of a new trial, or of one that was left behind; none when all trials were run."""
        try:
            if self._left_behind:
                trial = self._left_behind.pop(0)
                return self._fits(trial.number, trial.params)
            if self._begun() >= self.search.trials:
                return []
            asked = self.study.ask({key: self._range(given) for key, given in self.search.parameters.items()})
            asked.set_user_attr(FOLDER, self._place)
        except self._errors() as error:
            raise self._refusal(error) from error
        return self._fits(asked.number, asked.params)

    def _range(self, given: dict[str, Any]) -> Any:
        distributions = self._optuna.distributions
        if "choices" in given:
            return distributions.CategoricalDistribution(tuple(given["choices"]))
        whole = isinstance(given["low"], int) and isinstance(given["high"], int)
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(**{"step": 1 if whole else None} | given)

    def _fits(self, number: int, parameters: dict[str, Any]) -> list[Point]:
        points = [p for p in self.sweep.trial(parameters) if p.name not in self._trial_of]
        if not points:  # proposed before in this sweep: judged the same
            return self._again(number, parameters)
        self._open[number] = {}
        self._trial_of |= {point.name: number for point in points}
        return points

    def _again(self, number: int, parameters: dict[str, Any]) -> list[Point]:
        same = [t for t in self.study.get_trials(deepcopy=False) if t.params == parameters and t.values]
        if same:
            self.study.tell(number, same[0].values)
        else:
            self.study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        return self.ask()

    def tell(self, name: str, results: dict[str, Any] | None) -> None:
        """Notes the results of a point, None if it failed; the last of a trial's tells Optuna.

        Raises:
            KeyError: If the point belongs to no trial of this sweep.
            UserError: If the results lack an objective.
        """
        number = self._trial_of[name]
        found = self._open[number]
        found[name] = results
        if len(found) < sum(owner == number for owner in self._trial_of.values()):
            return
        del self._open[number]
        if any(one is None for one in found.values()):
            self.study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            return
        values = []
        for key in self.search.objectives:
            figures = [one.get(key) for one in found.values()]
            if not all(isinstance(figure, int | float) for figure in figures):
                numbers = sorted(k for k, v in next(iter(found.values())).items() if isinstance(v, int | float))
                raise UserError(f"results.json has no figure {key!r} to search by; it has {', '.join(numbers)}")
            values.append(sum(figures) / len(figures))
        self._tell(number, values)

    def _tell(self, number: int, values: list[float], patience: float = 60) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                self.study.tell(number, values)
                return
            except self._errors() as error:  # another process writes just now
                if time.monotonic() > deadline:
                    raise self._refusal(error) from error
                time.sleep(1)

    def write_front(self, path: Path) -> Path:
        """Writes the trials that no other beats in all objectives, as a markdown table."""
        keys, objectives = list(self.search.parameters), list(self.search.objectives)
        lines = [f"| {' | '.join(['trial', *keys, *objectives])} |", f"|{'---|' * (1 + len(keys) + len(objectives))}"]
        for trial in self.study.best_trials:
            cells = [
                str(trial.number),
                *(
                    f"{trial.params[k]:.4g}" if isinstance(trial.params[k], float) else str(trial.params[k])
                    for k in keys
                ),
                *(f"{value:.4f}" for value in trial.values),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        path.write_text("\n".join(lines) + "\n")
        return path

"""``lte sweep``: runs the missing fits of a sweep file."""

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lte_lightning.bars import lines_above_bars
from lte_lightning.cli.signals import on_sigterm
from lte_lightning.errors import UserError
from lte_lightning.options import call
from lte_lightning.report.collect import collect
from lte_lightning.results import read_results
from lte_lightning.shipped import SWEEPS, resolve
from lte_lightning.store import read_run_file
from lte_lightning.sweep.command import as_words, fit_command, sweep_options
from lte_lightning.sweep.engine import Engine, Runner, Summary
from lte_lightning.sweep.folder import COPY, FRONT, SweepFolder
from lte_lightning.sweep.local import LocalRunner
from lte_lightning.sweep.points import Point, Sweep
from lte_lightning.sweep.progress import Watch
from lte_lightning.sweep.recall import Remembered, recognise
from lte_lightning.sweep.search import Trials
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.sweep.table import write_tables
from lte_lightning.sweep.tracking import Tracker


@dataclass
class SweepOptions:
    """Runs the fits of a sweep file that are not done yet, each as one `lightning fit` of its own.

    Args:
        sweep: The sweep file. An option with a dot in its name goes to every fit: lte sweep sweeps/minilm-sst2.yaml
            --data.source FOLDER
        folder: Where runs and state are kept; runs/sweep-NAME if not given.
        workers: Fits at a time; 1 if not given, or all that a Ray cluster has room for.
        seeds: Seeds instead of the file's, such as 0,1,2.
        only: Run only these variants, or points whose names begin so; may be repeated.
        dry_run: Print the commands, run nothing.
        ray_address: Run on a Ray cluster: host:port, auto, or local for one of this machine.
        cpus: Cores per fit on Ray.
        gpus: GPUs per fit on Ray.
    """

    sweep: str
    folder: str | None = None
    workers: int | None = None
    seeds: str | None = None
    only: list[str] = field(default_factory=list)
    dry_run: bool = False
    ray_address: str | None = None
    cpus: int = 1
    gpus: float = 0


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: If something is wrong with the sweep, or a point failed.
    """
    own_words, extra = _split_options(args)
    given: SweepOptions = call(SweepOptions, "lte sweep", own_words, positional="sweep")
    sweep = read_sweep(resolve(given.sweep, SWEEPS), extra, _seeds(given.seeds))
    folder = SweepFolder(given.folder or Path("runs") / f"sweep-{sweep.path.stem}")
    sweep = recognise(sweep, folder)
    points = _select(sweep.points(), given.only)
    if given.dry_run:
        return _print_commands(sweep, folder, points)
    with on_sigterm(_terminated):
        _run(given, sweep, folder, points, ["lte", "sweep", *args])


def _run(given: SweepOptions, sweep: Sweep, folder: SweepFolder, points: list[Point], words: list[str]) -> None:
    """Runs the points and writes the sweep's tables and report; ``words`` are the command, which the folder keeps."""
    runner = _runner(given)
    recording = check(sweep, folder, points)
    with folder.hold(sweep, words=words):
        folder.plan(_all_points(sweep, folder)[0])
        if isinstance(runner, LocalRunner):
            runner.inherited = folder.lock
        tracker = Tracker(folder, recording["tracking_uri"]) if recording["mlflow"] else None
        trials = Trials(sweep, folder) if sweep.search else None
        watch = Watch(folder, runner.slots)
        engine = Engine(folder, runner, tracker, trials, watch=watch)
        summary, files = None, []
        try:
            if tracker:
                tracker.begin()
            with lines_above_bars(), watch:
                summary = engine.run(points)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            try:
                files = _write_results(sweep, folder, trials, bool(summary and summary.done))
            finally:
                if tracker:
                    tracker.end(files, failed=not files or summary is None or bool(summary.failed))
    _report(summary, files[1], engine)


def _all_points(sweep: Sweep, folder: SweepFolder) -> tuple[list[Point], int]:
    """Returns all points of a sweep, whether or not they were chosen, and the number of the folder's other fits."""
    own_points = sweep.points()
    remembered, left_out = Remembered(folder, sweep).matching(own_points)
    return own_points + remembered, left_out


def _write_results(sweep: Sweep, folder: SweepFolder, trials: Trials | None, draw: bool) -> list[Path]:
    """Writes the tables, the front of a search and the report into the sweep's folder."""
    points, left_out = _all_points(sweep, folder)
    if left_out:
        print(f"{folder.path} also holds {left_out} finished fits with other options; the tables leave them out")
    files = write_tables(folder, points)
    if trials:
        try:
            files.append(trials.write_front(folder.path / FRONT))
        except UserError as error:  # the storage is out of reach, which stopped the sweep
            print(error, file=sys.stderr)
    return [*files, folder.path / COPY, *(_draw(folder) if draw else [])]


def check(sweep: Sweep, folder: SweepFolder, points: list[Point]) -> dict[str, Any]:
    """Checks the command lines of all points that are not done, in another process, before any of them runs.

    Raises:
        UserError: If a point names an unknown option or a wrong value, or if another version wrote a run of a point.
    """
    attempts = folder.attempts()
    for point in points:
        for run in attempts.get(point.name, []):
            read_run_file(run)
        if done := folder.finished(point.name, attempts):
            read_results(done)
    first_seed = [point for point in points if point.seed == sweep.seeds[0]]
    missing = [point for point in first_seed if folder.finished(point.name, attempts) is None]
    if sweep.search:
        missing += [sweep.trial(parameters)[0] for parameters in sweep.search.examples()]
    commands = {shlex.join(fit_command(point)): point for point in missing or first_seed[:1]}
    print(f"checking {len(commands)} command lines", flush=True)
    process = subprocess.run(
        [sys.executable, "-m", "lte_lightning.cli.check"],
        input=json.dumps([fit_command(point) for point in commands.values()]),
        capture_output=True,
        text=True,
    )
    try:
        answers = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RuntimeError(f"the points could not be checked:\n{process.stderr}") from error
    pairs = zip(commands.values(), answers, strict=True)
    wrong = [f"{point.name}: {answer['error']}" for point, answer in pairs if answer["error"]]
    if wrong:
        remark = f"\n({len(wrong) - 3} more)" if len(wrong) > 3 else ""
        noun = "fit" if len(wrong) == 1 else "fits"
        lines = "\n".join(wrong[:3])
        raise UserError(f"{sweep.path}: {len(wrong)} {noun} cannot be run, so none was started\n{lines}{remark}")
    return {"mlflow": any(answer["mlflow"] for answer in answers), "tracking_uri": answers[0]["tracking_uri"]}


def _seeds(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text!r}; give whole numbers, such as 0,1,2") from None


def _split_options(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits this command's words from options of every fit, ``--key value`` or ``--key=value`` with a dot."""
    own_words: list[str] = []
    extra: dict[str, Any] = {}
    words = list(args)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or "." not in key:
            own_words.append(word)
            continue
        if not equals:
            if not words:
                raise UserError(f"{key} has no value")
            value = words.pop(0)
        extra[key.removeprefix("--")] = yaml.safe_load(value) if value in ("true", "false", "null") else value
    return own_words, extra


def _select(points: list[Point], only: list[str]) -> list[Point]:
    if not only:
        return points
    candidates = [point for point in points if point.role == "point"]
    variants = {point.variant for point in points}

    def is_called(point: Point, name: str) -> bool:
        return point.variant == name if name in variants else point.name.startswith(name)

    if lost := [name for name in only if not any(is_called(point, name) for point in candidates)]:
        known = sorted({point.variant or point.name for point in candidates})
        raise UserError(f"no point is called {' or '.join(lost)}; there are {', '.join(known)}")
    selected = [point for point in candidates if any(is_called(point, name) for name in only)]
    needed = {name for point in selected for name in point.needs}
    return [point for point in points if point in selected or point.name in needed]


def _runner(typed: SweepOptions) -> Runner:
    if typed.ray_address is None:
        return LocalRunner(1 if typed.workers is None else typed.workers)
    from lte_lightning.sweep.ray import RayRunner

    return RayRunner(typed.ray_address, typed.workers, typed.cpus, typed.gpus)


def _print_commands(sweep: Sweep, folder: SweepFolder, points: list[Point]) -> None:
    attempts = folder.attempts()
    runs = {point.name: run for point in points if (run := folder.finished(point.name, attempts))}
    for point in points:
        print(f"# {point.name}{': done' if point.name in runs else ''}")
        added = as_words(sweep_options(point, folder, runs, future_runs=True))
        print(f"lightning {shlex.join(fit_command(point) + added)}")
    if sweep.search:
        print(f"# and {sweep.search.trials} trials over {', '.join(sweep.search.parameters)}, as Optuna proposes them")


def _draw(folder: SweepFolder) -> list[Path]:
    """Writes the sweep's report, and returns its files."""
    from lte_lightning.report.page import write_report  # matplotlib is slow to import

    page = write_report(collect([folder.path]), folder.path / "report", f"Sweep {folder.about['name']}")
    return sorted(page.parent.iterdir())


def _report(summary: Summary, table: Path, engine: Engine) -> None:
    print(table.read_text(), end="")
    if summary.done:
        print(engine.folder.path / "report" / "index.html")
    if engine.trials is not None:
        print(engine.folder.path / FRONT)
    print(table, flush=True)
    if summary.failed or summary.blocked:
        lines = [f"  {name}: exit code {code}, {engine.folder.log(name)}" for name, code in summary.failed.items()]
        lines += [f"  {name}: not run: a fit that it depends on failed" for name in summary.blocked]
        again = "start the sweep again to try them once more"
        if engine.trials is not None:
            again = "failed trials count: raise trials for more; start the sweep again for what was not run"
        counts = f"{len(summary.failed)} of {len(engine.points)} points failed, {len(summary.blocked)} were not run"
        raise UserError("\n".join([f"{counts}; {again}", *lines]))


def _terminated(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)

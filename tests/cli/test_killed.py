"""Fits that are killed by SIGKILL at seeded moments, resumed, and compared with one that nobody disturbed.

`nox -s kill` runs them (a quarter of an hour), and writes what happened as a table; docs/tried.md has one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from lte_lightning.callbacks.sharded_checkpoint import read_folder

pytestmark = [pytest.mark.kill, pytest.mark.timeout(1800)]
SECONDS = 600  # the longest that one command may take
ETA = "model.efficiency_weight"


@dataclass(frozen=True)
class Case:
    """A kind of fit. `options` have dotted keys."""

    name: str
    model: str  # the fixture
    epochs: tuple[int, int, int]
    options: dict


CASES = {
    "classifier": Case("classifier, in passes, MLflow", "tiny", (2, 2, 2), {"trainer.logger": True}),
    "steps": Case(
        "classifier, stages in steps within a pass",
        "tiny",
        (1, 1, 1),
        {"stages.dense.steps": 11, "stages.router.steps": 13, "stages.expert.steps": 12},
    ),
    "stream": Case(
        "generator, on a stream of rows",
        "tiny_lm",
        (1, 1, 1),
        {
            "data.init_args.streaming": True,
            "data.init_args.shuffle_buffer": 24,
            "stages.dense.steps": 14,
            "stages.router.steps": 12,
            "stages.expert.steps": 8,
            "trainer.limit_train_batches": 3,
        },
    ),
    "lora": Case("generator, LoRA", "tiny_lm", (2, 2, 2), {"model.init_args.lora": {"rank": 2}}),
    "two": Case(
        "classifier, two processes (DDP)", "tiny", (2, 2, 2), {"trainer.devices": 2, "trainer.strategy": "ddp"}
    ),
    "sharded": Case(
        "classifier, two processes (FSDP2)", "tiny", (2, 2, 2), {"trainer.devices": 2, "trainer.strategy": "fsdp2"}
    ),
}


def written(name: str, count: int) -> Callable[[Path], bool]:
    """A moment: while a file of a run is written for the nth time, before it takes its name."""
    seen = [False]

    def now(run: Path) -> bool:
        there = (run / f"{name}.tmp").exists()
        if there != seen[-1]:
            seen.append(there)
        return sum(seen) >= count

    return now


def replaced(count: int) -> Callable[[Path], bool]:
    """A moment: as soon as last.ckpt is there for the nth time, at the end of an epoch, of a stage for some n."""
    seen: set[int] = set()

    def now(run: Path) -> bool:
        try:
            seen.add((run / "checkpoints" / "last.ckpt").stat().st_mtime_ns)
        except OSError:
            return False
        return len(seen) >= count

    return now


def saving(run: Path) -> bool:
    """A moment: while the model's folder is written."""
    return any(run.glob(".model-*"))


# What is killed when: a share of the time that a fit takes from its run.json to its end, or a moment by its name.
LAST = "checkpoints/last.ckpt"
MOMENTS = {
    "classifier": [0.05, 0.3, 0.5, 0.7, 0.9, "first", "second", "switch", "saving"],
    "steps": [0.2, 0.5, 0.8],
    "stream": [0.2, 0.45, 0.7, "second"],
    "lora": [0.25, 0.6, "switch", "second"],
    "two": [0.3, 0.7, "switch"],
    "sharded": [0.3, 0.7, "switch"],
}
NAMED = {
    "first": ("the first checkpoint is written", lambda: written(LAST, 1)),
    "second": ("a checkpoint is written over another", lambda: written(LAST, 2)),
    "switch": ("a stage has just ended", lambda: replaced(2)),
    "saving": ("the model's folder is written", lambda: saving),
}


@pytest.fixture(scope="module")
def table() -> Callable[..., None]:
    """`table(fit, when, left, source)`: adds a row of what was tried to the file that LTE_KILL_TABLE names."""
    head = ("fit", "killed when", "left", "resumed from")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]

    def add(*row: str) -> None:
        lines.append(row)
        if path := os.environ.get("LTE_KILL_TABLE"):
            Path(path).write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))

    return add


@pytest.fixture(scope="module")
def config(request, tmp_path_factory) -> Callable[[str], dict]:
    def make(case: str) -> dict:
        about = CASES[case]
        return request.getfixturevalue(about.model).config(epochs=about.epochs, **about.options)

    return make


def start(cwd: Path, *words: object) -> subprocess.Popen:
    log = (cwd / "log.txt").open("a")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "lte_lightning", *map(str, words)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, cwd: Path) -> None:
    try:
        assert process.wait(SECONDS) == 0, (cwd / "log.txt").read_text()
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kills a command and all that it started, if any of it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_for(there: Callable[[], bool], process: subprocess.Popen, seconds: float = SECONDS) -> bool:
    """Waits without a pause longer than a checkpoint's writing; False if the process ended or the time is over."""
    deadline = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.0003)
    return True


def the_run(cwd: Path) -> Path | None:
    return next((file.parent for file in cwd.glob("runs/*/*/run.json")), None)


def checkpoint(path: Path) -> dict:
    """A checkpoint whole, a file or a folder of several processes."""
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint(run / LAST)["state_dict"]


def results(run: Path) -> dict:
    found = json.loads((run / "results.json").read_text())
    kept = {key: value for key, value in found.items() if key not in ("seconds_per_stage", "floor", "versions")}
    # a sweep's start is a run, whose id is new each time
    kept["options"] = {key: value for key, value in found["options"].items() if key != "model.init_from"}
    return kept


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Callable[[str], tuple[Path, float]]:
    """`undisturbed(case)`: the run of a whole fit, and the seconds from its run.json to its end."""
    made: dict[str, tuple[Path, float]] = {}

    def make(case: str) -> tuple[Path, float]:
        if case not in made:
            cwd = tmp_path_factory.mktemp(case)
            (cwd / "fit.yaml").write_text(yaml.safe_dump(config(case)))
            process = start(cwd, "fit", "--config", "fit.yaml")
            assert wait_for(lambda: the_run(cwd) is not None, process), (cwd / "log.txt").read_text()
            began = time.monotonic()
            finish(process, cwd)
            made[case] = the_run(cwd), time.monotonic() - began
        return made[case]

    return make


@pytest.mark.parametrize(("case", "moment"), [(case, moment) for case in MOMENTS for moment in MOMENTS[case]])
def test_a_killed_fit_ends_as_an_undisturbed_one(case, moment, undisturbed, config, tmp_path, table):
    whole, seconds = undisturbed(case)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config(case)))
    process = start(tmp_path, "fit", "--config", "fit.yaml")
    try:
        assert wait_for(lambda: the_run(tmp_path) is not None, process), (tmp_path / "log.txt").read_text()
        run = the_run(tmp_path)
        if isinstance(moment, str):
            when, make = NAMED[moment]
            there = make()
            assert wait_for(lambda: there(run), process), f"{when}: never seen"
        else:
            share = moment + 0.1 * (random.Random(f"{case} {moment}").random() - 0.5)
            when = f"{share:.0%} of an undisturbed one's time was over"
            wait_for(lambda: False, process, share * seconds)
    finally:
        end(process)
    last, left = run / LAST, [path.name for path in run.rglob("*.tmp")]
    left += [path.name.rpartition("-")[0] + "-..." for path in run.glob(".model-*")]
    resumed, source = [], "the beginning"
    if last.exists():
        content = checkpoint(last)  # whole, or this fails
        source = f"epoch {content['epoch'] + 1}, stage {content['lte']['stage']}"
        resumed = ["--ckpt_path", last]
    else:
        shutil.rmtree(run)
    (tmp_path / "log.txt").unlink()
    finish(start(tmp_path, "fit", "--config", "fit.yaml", *resumed), tmp_path)
    said = (tmp_path / "log.txt").read_text()
    run = the_run(tmp_path)
    mine, theirs = weights(run), weights(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert results(run) == results(whole)
    assert "Traceback" not in said, said
    table(CASES[case].name, when, ", ".join(left) or "nothing", source)


@pytest.fixture(scope="module")
def sweep_words(tiny, tmp_path_factory) -> list[object]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny.config(epochs=(2, 1, 1))))
    content = {"configs": ["tiny.yaml"], "start": {}, "variants": {"LTE": {"list": [{ETA: 0.5}, {ETA: 1.0}]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return ["sweep", folder / "sweep.yaml", "--folder", "runs/sweep"]


def points(cwd: Path) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    return {
        json.loads(file.with_name("run.json").read_text())["name"]: (results(file.parent), weights(file.parent))
        for file in cwd.glob("runs/sweep/*/results.json")
    }


@pytest.fixture(scope="module")
def whole_sweep(sweep_words, tmp_path_factory) -> dict:
    cwd = tmp_path_factory.mktemp("whole-sweep")
    finish(start(cwd, *sweep_words), cwd)
    return points(cwd)


@pytest.mark.parametrize("checkpoints", [1, 3, 5])
def test_a_killed_sweep_ends_as_an_undisturbed_one(checkpoints, whole_sweep, sweep_words, tmp_path, table):
    """Each of its three fits leaves two checkpoints: it is killed between those of the first, second, third."""
    process, seen = start(tmp_path, *sweep_words), set()

    def there() -> bool:
        for file in tmp_path.glob("runs/sweep/*/checkpoints/last.ckpt"):
            seen.add((file, file.stat().st_mtime_ns))
        return len(seen) >= checkpoints

    try:
        assert wait_for(there, process), (tmp_path / "log.txt").read_text()
    finally:
        end(process)
    done = len(points(tmp_path))
    begun = len(list(tmp_path.glob("runs/sweep/*/run.json")))
    finish(start(tmp_path, *sweep_words), tmp_path)
    mine = points(tmp_path)
    assert mine.keys() == whole_sweep.keys()
    assert len(mine) == 3
    for name, (found, state) in mine.items():
        expected, other = whole_sweep[name]
        differing = {key for key in expected if found[key] != expected[key]}
        assert differing == set()
        assert [key for key in other if not torch.equal(state[key], other[key])] == []
    left = f"{done} of 3 fits done, {begun - done} in its midst"
    table("sweep of three fits", f"checkpoint {checkpoints} of 6 was just written", left, "what was done")

"""Sweeps whose fits are the stand-in, so that an engine's test takes no longer than the engine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte_lightning.sweep.engine import Engine, Summary
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.local import LocalRunner
from lte_lightning.sweep.recall import recognise
from lte_lightning.sweep.search import Trials
from lte_lightning.sweep.spec import read_sweep

STAND_IN = Path(__file__).parent / "stand_in.py"


@dataclass
class Swept:
    """A sweep after it ran."""

    summary: Summary
    folder: SweepFolder
    said: list[str]
    engine: Engine

    def log(self, start: str) -> str:
        (file,) = self.folder.points.glob(f"{start}*.log")
        return file.read_text()


@dataclass
class Bench:
    """A folder with a sweep file."""

    cwd: Path
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        (self.cwd / "base.yaml").write_text("model: {}\n")
        file = self.cwd / "trial.yaml"
        file.write_text(yaml.safe_dump({"configs": ["base.yaml"]} | self.content))
        return file

    def run(
        self,
        workers: int = 1,
        extra: dict[str, Any] | None = None,
        runner: Any = None,
        tracker: Any = None,
        watch: Any = None,
        **more: Any,
    ) -> Swept:
        folder, said = SweepFolder(self.cwd / "runs" / "trial"), []
        sweep = recognise(read_sweep(self.file, extra, **more), folder)
        with folder.hold(sweep, patience=5):
            runner = runner or LocalRunner(workers, (sys.executable, str(STAND_IN)), folder.lock)
            trials = Trials(sweep, folder) if sweep.search else None
            shown = watch(folder, runner.slots) if watch else None
            engine = Engine(folder, runner, tracker and tracker(folder), trials, said.append, shown)
            with shown or contextlib.nullcontext():
                return Swept(engine.run(sweep.points()), folder, said, engine)

    def begin(self, workers: int = 1) -> subprocess.Popen:
        """Starts the same in a process of its own, to be killed."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import conftest; "
            "conftest.Bench(Path(sys.argv[2]), __import__('json').loads(sys.argv[3])).run(int(sys.argv[4]))"
        )
        words = [str(STAND_IN.parent), str(self.cwd), __import__("json").dumps(self.content), str(workers)]
        return subprocess.Popen([sys.executable, "-c", code, *words], cwd=self.cwd, env=os.environ)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Callable[..., Bench]:
    """`bench(grid=..., ...)` is a folder with a sweep file of that content; the test's folder is the current one."""
    monkeypatch.chdir(tmp_path)
    return lambda **content: Bench(tmp_path, content)

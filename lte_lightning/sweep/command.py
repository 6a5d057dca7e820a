"""How a point of a sweep becomes a command of `lightning`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte_lightning.results import FILE
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.points import Point, text


def fit_command(point: Point) -> list[str]:
    """Returns the words of a point's fit, without options about other fits or the place of its run."""
    files = [word for path in point.configs for word in ("--config", path)]
    return ["fit", *files, *as_words({"seed_everything": point.seed} | point.overrides)]


def resume_command(run: Path) -> list[str]:
    """Returns the words that resume a run from its last checkpoint."""
    folder = os.path.relpath(run)
    return ["fit", "--config", f"{folder}/config.yaml", "--ckpt_path", f"{folder}/checkpoints/last.ckpt"]


def sweep_options(
    point: Point, folder: SweepFolder, runs: Mapping[str, Path], future_runs: bool = False
) -> dict[str, Any]:
    """Returns the options that a sweep adds to a point's fit: its start, its floor and the place of its run.

    Args:
        point: The point.
        folder: The sweep's folder.
        runs: Runs of finished points, by name.
        future_runs: Whether the options may name runs that are not there yet, to be shown only.
    """

    def run_of(name: str) -> Path:
        return runs.get(name) or folder.finished(name) or folder.path / f"<run of {name}>"

    added: dict[str, Any] = {}
    if point.start:
        added["model.init_from"] = os.path.relpath(run_of(point.start) / "model")
    if point.floor and (future_runs or point.floor in runs):
        added["run.floor_from"] = os.path.relpath(run_of(point.floor) / FILE)
    added |= {"run.root": os.path.relpath(folder.path.parent), "run.experiment": folder.path.name}
    return added | {"run.name": point.name, "trainer.enable_progress_bar": False}


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Writes options as a command line has them."""
    return [word for key, value in options.items() for word in (f"--{key}", text(value))]

"""What one sees of a sweep while it runs."""

import io
import re

import pytest
from rich.console import Console

from lte_lightning.results import Place
from lte_lightning.sweep import engine, progress
from lte_lightning.sweep.progress import Watch

ETA = "model.efficiency_weight"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Looks every few milliseconds, as the stand-in's fits take no longer."""
    monkeypatch.setattr(engine, "LOOK", 0.05)
    monkeypatch.setattr(progress, "SEARCH", 0.05)


def test_a_line_for_every_event(bench):
    lines = []
    trial = bench(start={}, grid={ETA: [0.1]}, overrides={"data.step": 1.5})
    swept = trial.run(watch=lambda folder, slots: Watch(folder, slots, lines.append, Console(file=io.StringIO())))
    names = [point.name for point in swept.engine.points.values()]
    told = [line.partition(" (")[0] for line in lines]
    assert told == [
        f"{name}: {what}"
        for name in names
        for what in ("started", "router 1/1, epoch 1 of 2", "expert 1/1, epoch 2 of 2")
    ]
    assert lines[1].endswith("time left unknown")  # of the first fit's first epoch nobody knows how long it takes
    assert re.search(r"\(\d s\); more than \d s left$", lines[2])  # nor, when it is known, how long a point takes
    # and once a point is done, of its kind
    trial.content["grid"] = {ETA: [0.1, 0.2]}
    lines.clear()
    trial.run(watch=lambda folder, slots: Watch(folder, slots, lines.append, Console(file=io.StringIO())))
    assert all(re.search(r"\(\d s\); about \d s left$", line) for line in lines[1:])


def test_a_line_for_every_fit_on_a_terminal(bench):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    trial = bench(grid={ETA: [0.1, 0.2]}, overrides={"data.step": 1.0})
    trial.run(workers=2, watch=lambda folder, slots: Watch(folder, slots, console=console))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for eta in (0.1, 0.2):
        assert re.search(rf"fit-efficiency_weight={eta}-s0-\w+ +\S+ +1/2 expert 1/1 +0:00:0\d", shown)
    assert re.search(r"fits +\S+ +2/2 ", shown)


def test_a_fit_that_says_nothing_is_shown_as_starting(tmp_path):
    assert Place.read(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"stage": ')
    assert Place.read(tmp_path) is None
    place = Place("router", 1, 2, 3, 4)
    place.write(tmp_path)
    assert Place.read(tmp_path) == place

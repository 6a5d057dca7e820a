"""What one sees of a sweep while it runs."""

import io
import re

import pytest

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
    swept = trial.run(watch=lambda folder, slots: Watch(folder, slots, lines.append, io.StringIO()))
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
    trial.run(watch=lambda folder, slots: Watch(folder, slots, lines.append, io.StringIO()))
    assert all(re.search(r"\(\d s\); about \d s left$", line) for line in lines[1:])


def test_a_bar_for_every_fit_on_a_terminal(bench, terminal):
    seen = []

    class Seen(Watch):
        def update(self, *where):
            super().update(*where)
            seen.append(terminal.lines())

    lines = []
    trial = bench(grid={ETA: [0.1, 0.2]}, overrides={"data.step": 1.0})
    trial.run(workers=2, watch=lambda folder, slots: Seen(folder, slots, lines.append, terminal))
    bar, time = r"\|[█▏▎▍▌▋▊▉ ]{20}\|", r"00:\d\d"
    assert all(row.startswith("fits ") for row, *_ in seen)
    assert max(map(len, seen)) == 3  # both fits at a time
    rows = sorted({row for shown in seen for row in shown})
    for row in (
        rf"fits           0/2   {bar} {time}, time left unknown",
        rf"fits           [01]/2   {bar} {time}, about \d+ s left",
        rf"router 1/1     0/2   {bar} {time}, fit-efficiency_weight=0.1-s0-\w+",
        rf"router 1/1     0/2   {bar} {time}, fit-efficiency_weight=0.2-s0-\w+",
        rf"expert 1/1     1/2   \|█{{10}} {{10}}\| {time}, fit-efficiency_weight=0.1-s0-\w+",
        rf"expert 1/1     1/2   \|█{{10}} {{10}}\| {time}, fit-efficiency_weight=0.2-s0-\w+",
    ):
        assert any(re.fullmatch(row, one) for one in rows), (row, rows)
    (last,) = seen[-1]
    assert re.fullmatch(rf"fits           2/2   \|█{{20}}\| {time}, about 0 s left", last)
    assert terminal.lines() == []  # the bars are gone, and the table has the screen
    assert lines == []


def test_bars_that_the_user_switched_off_are_lines(bench, terminal, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    lines = []
    swept = bench(grid={ETA: [0.1]}).run(watch=lambda folder, slots: Watch(folder, slots, lines.append, terminal))
    assert lines[0] == f"{next(iter(swept.engine.points))}: started"
    assert terminal.lines() == []


def test_a_fit_that_says_nothing_is_shown_as_starting(tmp_path):
    assert Place.read(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"stage": ')
    assert Place.read(tmp_path) is None
    place = Place("router", 1, 2, 3, 4)
    place.write(tmp_path)
    assert Place.read(tmp_path) == place

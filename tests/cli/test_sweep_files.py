"""The committed sweep files: every kind of point that they have is instantiated."""

import itertools
import sys
from pathlib import Path

import pytest

from lte_lightning.cli.check import check_commands
from lte_lightning.sweep.command import fit_command
from lte_lightning.sweep.spec import read_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"
ETA = "model.efficiency_weight"


def test_there_are_sweeps():
    assert {"smoke.yaml", "minilm-sst2.yaml"} <= {path.name for path in SWEEPS.glob("*.yaml")}


@pytest.mark.timeout(600)  # some have hundreds of points
@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_s_points_are_instantiated(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lte"])
    sweep = read_sweep(path, {"trainer.accelerator": "cpu", "trainer.devices": 1}, seeds=[0])
    points = sweep.points()
    if sweep.search:
        points += [point for one in sweep.search.examples() for point in sweep.trial(one)]
    assert sweep.about
    assert {point.role for point in points} == {"start", "floor", "point"}
    kept = representatives(points)
    found = check_commands([fit_command(point) for point in kept])
    assert [one["error"] for one in found] == [None] * len(kept)


def representatives(points):
    """Points that show each role of each variant, and each option with each of its words, of numbers the two ends."""
    words = {}
    for option, word in itertools.chain(*map(pairs, points)):
        words.setdefault(option, {})[word] = point_number(word)
    middle = {
        (option, word)
        for option, numbers in words.items()
        for word, number in numbers.items()
        if None not in numbers.values() and min(numbers.values()) < number < max(numbers.values())
    }
    seen, kept = set(), []
    for point in points:
        facts = {(point.role, point.variant), *pairs(point)} - middle
        if not facts <= seen:
            kept.append(point)
        seen |= facts
    return kept


def pairs(point):
    return [(option, word) for option, word in itertools.pairwise(fit_command(point)) if option.startswith("--")]


def point_number(word):
    try:
        return float(word)
    except ValueError:
        return None


def test_a_sweep_s_representatives():
    points = read_sweep(SWEEPS / "minilm-stsb.yaml", {}, seeds=[0]).points()
    kept = representatives(points)
    assert 0 < len(kept) < len(points)
    assert {point.role for point in kept} == {"start", "floor", "point"}
    etas = [point.overrides[ETA] for point in points if point.role == "point"]
    assert {point.overrides[ETA] for point in kept if point.role == "point"} == {min(etas), max(etas)}
    points = read_sweep(SWEEPS / "roberta-base-glue.yaml", {}, seeds=[0]).points()
    kept = representatives(points)
    for of in (lambda point: (point.role, point.variant), lambda point: fit_command(point)[2]):
        assert {*map(of, kept)} == {*map(of, points)}  # each method and each configuration, not each pair of them
    assert len(kept) < len(points) / 4

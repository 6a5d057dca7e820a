"""The sweep files: in each every method, and the floor, adapts the model as long as LTE does."""

from pathlib import Path

import pytest
import yaml

from lte_lightning.callbacks.stages import StagePlan
from lte_lightning.report.methods import describe
from lte_lightning.sweep.points import Point
from lte_lightning.sweep.spec import read_sweep

FILES = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
COMPARISONS = [file for file in FILES if file.stem.startswith("compare-")]
SHORTER = ("without stage 2",)  # an ablation of just that


def plans(point: Point) -> dict[str, dict]:
    """The stages of a fit, as its configurations and options give them."""
    found: dict[str, dict] = {"router": {}, "expert": {}}
    for config in point.configs:
        stages = yaml.safe_load(Path(config).read_text()).get("stages", {})
        stages = yaml.safe_load((Path(config).parent / stages).read_text()) if isinstance(stages, str) else stages
        for stage, plan in found.items():
            plan |= stages.get(stage, {})
    for key, value in point.overrides.items():
        if key.startswith(("stages.router.", "stages.expert.")):
            _, stage, option = key.split(".", 2)
            found[stage][option] = value
    return found


def stages_of_the_model(point: Point) -> dict[str, dict]:
    """The plans of those stages that train the model's weights."""
    learns = describe({"selector": point.overrides.get("model.lte.selector", "router")}).learns_with_task
    found = {stage: plan for stage, plan in plans(point).items() if stage == "expert" or learns}
    return {stage: plan for stage, plan in found.items() if plan["epochs"] != 0}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_method_and_the_floor_adapt_the_model_as_long(file):
    sweep = read_sweep(file)
    points = sweep.points() + (
        [point for one in sweep.search.examples() for point in sweep.trial(one)] if sweep.search else []
    )
    lengths: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
    for point in points:
        if point.role != "start" and point.variant not in SHORTER:
            stages = stages_of_the_model(point).values()
            steps = sum(plan.get("steps") or 0 for plan in stages)
            epochs = sum(plan["epochs"] for plan in stages if not plan.get("steps"))
            lengths.setdefault(point.configs, {})[point.name] = (epochs, steps)
    assert lengths
    for found in lengths.values():
        assert len(found) > 1
        assert len(set(found.values())) == 1, found


def adaptations(file: Path) -> list[dict[str, dict]]:
    found = [stages_of_the_model(point) for point in read_sweep(file).points() if point.role != "start"]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("file", [file for file in COMPARISONS if "e2e" not in file.stem], ids=lambda file: file.stem)
def test_every_method_adapts_the_model_at_the_same_rate(file):
    rates: dict[str, set[float]] = {"router": set(), "expert": set()}
    for stages in adaptations(file):
        for stage, plan in stages.items():
            rates[stage].add(plan["learning_rate"])
    assert {len(found) for found in rates.values()} == {1}, rates


def test_every_method_adapts_a_language_model_at_the_same_rate_in_every_step():
    """A decay goes on from one stage into the next."""
    curves = []
    for stages in adaptations(next(file for file in COMPARISONS if file.stem == "compare-e2e")):
        curve: list[float] = []
        for given in stages.values():
            plan = StagePlan(**{key: value for key, value in given.items() if key != "optimizer"})
            curve += [plan.learning_rate * plan.factor(step, plan.steps) for step in range(plan.steps)]
        curves.append(curve)
    assert (len(curves[0]), max(curves[0])) == (400, 1e-3)
    assert all(curve == pytest.approx(curves[0], abs=1e-6) for curve in curves)

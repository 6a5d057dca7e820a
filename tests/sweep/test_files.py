"""The sweep files that compare methods."""

from pathlib import Path

import pytest

from lte_lightning.sweep.spec import read_sweep

FILES = sorted((Path(__file__).parents[2] / "sweeps").glob("compare-*.yaml"))
WITH_THE_TASK = ("router", "softmax", "sigmamoe")  # learn in the router stage, and the model's weights with them


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_method_adapts_the_model_as_long_and_at_the_same_rate(file):
    unit = "steps" if "e2e" in file.stem else "epochs"
    trained, rates = {}, {"router": set(), "expert": set()}
    for point in read_sweep(file).points():
        if point.role == "start":
            continue
        options = point.overrides
        stages = ["expert"]
        if options.get("model.lte.selector", "router") in WITH_THE_TASK and options.get("stages.router.epochs") != 0:
            stages.append("router")
        trained[point.name] = sum(options[f"stages.{stage}.{unit}"] for stage in stages)
        for stage in stages:
            rates[stage].add(options.get(f"stages.{stage}.learning_rate"))
    assert len(trained) > 20
    assert len(set(trained.values())) == 1, trained
    assert {len(found) for found in rates.values()} == {1}, rates

"""What is said of a loss: paired by seed, against the honest dense model, and never of an undefined figure."""

import pytest

from lte_lightning.report import tables
from lte_lightning.report.collect import collect


@pytest.fixture
def material_of(make_points, tmp_path):
    """`material_of(*points)` is a report's material; a point is (variant, selector, results)."""

    def make(*points):
        rows = [
            {"name": f"p{i}", "seed": found["seed"], "variant": variant, "selector": selector, "results": found}
            | {"parameters": {"level": found["sparsity"]}, "role": "point" if variant else "start"}
            for i, (variant, selector, found) in enumerate(points)
        ]
        return collect([make_points(tmp_path / "trial", rows)])

    return make


def column(material, head):
    table = tables.everything(material, "sst2")
    return [row[table.heads.index(head)] for row in table.rows]


def said(material, method):
    (line,) = (line for line in tables.summary(material, "sst2", None) if line.startswith(f"{method} "))
    return line


@pytest.fixture
def start(figures):
    """`start(seed)` has a dense figure of 0.90, 0.91, 0.92."""
    return lambda seed: (
        None,
        "router",
        figures(None, None, seed, seconds_per_stage={"dense": 1.0}, sparsity_per_layer=None),
    )


def test_a_seed_is_read_against_its_own_dense_figure(material_of, start, figures):
    """0.905 is near the mean of 0.90, 0.91 and 0.92, but its own seed's dense model has 0.92."""
    material = material_of(*map(start, range(3)), ("KLA", "kla", figures(0.905, 0.8, 2)))
    assert column(material, "lost") == ["0.0150"]
    assert said(material, "KLA") == "KLA (oracle) loses more than 0.01 at every setting."
    assert tables.flops(material, None).rows[1] == ["KLA (oracle)", "none within"]


def test_an_undefined_figure_is_no_good_one(material_of, start, figures):
    material = material_of(
        start(0),
        ("random routers", "random", figures(None, 0.9, hard_before=0.9, soft=0.9)),
        ("KLA", "kla", figures(None, 0.9)),
        ("CATS", "cats", figures(0.9, 0.5)),
        ("CATS", "cats", figures(None, 0.5, 1)),
        ("without stage 2", "router", figures(None, 0.5, hard_before=0.895, seconds_per_stage={"router": 1.0})),
    )
    values = dict(zip(column(material, "method"), column(material, "accuracy"), strict=True))
    assert values == {
        "random routers": "undefined",
        "KLA (oracle)": "undefined",
        "CATS": "0.9000 (undefined: seed 1)",
        "without stage 2": "0.8950",
    }
    (cats,) = (setting for setting in material.settings() if setting.method == "CATS")
    assert cats.mean("value") is None  # so that no picture has the mean of the other seeds
    assert said(material, "KLA") == "KLA (oracle) has an undefined accuracy at every setting."
    assert "undefined" in said(material, "CATS")
    assert "loses at most 0.01 up to 50 %" in said(material, "without")
    cells = dict(tables.flops(material, None).rows)
    assert cells.pop("without stage 2").startswith("8 (")
    assert cells.pop("dense") == "12"
    assert set(cells.values()) == {"none within"}
    assert tables.levels(material, "sst2").rows[0] == ["random routers", *["undefined"] * 4]


def test_the_span_is_that_of_the_printed_figures(material_of, start, figures):
    """Without stage 2 too, and over the seeds whose floor is below dense."""
    router = {"seconds_per_stage": {"router": 1.0}, "floor": 0.6}
    material = material_of(
        start(0),
        ("without stage 2", "router", figures(None, 0.5, hard_before=0.84, **router)),
        ("LTE", "router", figures(0.855, 0.5, floor=0.6)),
        ("LTE", "router", figures(0.855, 0.5, 1, floor=0.95)),
    )
    assert column(material, "span kept") == ["80 %", "85 % (1 of 2 seeds)"]


def test_dense_is_what_was_trained_on_as_long(material_of, start, figures):
    points = [start(0), start(1), ("KLA", "kla", figures(0.91, 0.5)), ("KLA", "kla", figures(0.9, 0.5, 1))]
    trained = [("dense, trained on", "narrow", figures(hard, 0.0, seed)) for seed, hard in ((0, 0.95), (1, 0.93))]
    material = material_of(*points, *trained)
    assert material.dense("sst2") == {0: 0.95, 1: 0.93}
    assert material.reference("sst2", "dense") == [0.95, 0.93]
    lines = tables.summary(material, "sst2", None)
    assert lines[0].startswith(
        "The reference (dense, trained on as long as the others) reaches accuracy 0.9400 ± 0.0141, before that "
        "0.9050 ± 0.0071"
    )
    assert not any(line.startswith("dense, trained on") for line in lines)
    assert [setting.method for setting in material.settings()] == ["KLA"]
    assert [row[0] for row in tables.flops(material, None).rows] == ["dense", "KLA (oracle)"]
    assert column(material, "method") == ["dense, trained on", "KLA (oracle)"]
    assert column(material, "lost") == ["0.0000 ± 0.0000", "0.0350 ± 0.0071"]


def test_dense_is_the_better_of_start_and_trained_on(material_of, start, figures):
    trained = [("dense, trained on", "narrow", figures(hard, 0.0, seed)) for seed, hard in ((0, 0.95), (1, 0.5))]
    material = material_of(start(0), start(1), *trained)
    assert material.dense("sst2") == {0: 0.95, 1: 0.91}
    assert material.dense_kind("sst2") == (
        "dense, trained on as long as the others, or dense, not trained on if that is better or the only value (seed 1)"
    )


def test_models_that_were_not_trained_on_equally_long_are_named(make_points, figures, tmp_path):
    """LTE's router stage trains the model, that of Deja Vu its predictors alone: 2 epochs are not 2 epochs."""
    rows = [
        {
            "name": "start",
            "seed": 0,
            "role": "start",
            "results": figures(None, None, 0, seconds_per_stage={"dense": 1.0}),
        },
        {"name": "floor", "seed": 0, "role": "floor", "selector": "none", "results": figures(0.6, 1.0, floor=0.6)},
        {"name": "lte", "seed": 0, "variant": "LTE", "results": figures(0.9, 0.5, floor=0.6)},
        {"name": "on", "seed": 0, "variant": "on", "selector": "narrow", "results": figures(0.95, 0.0, floor=0.6)},
    ]
    alike = collect([make_points(tmp_path / "alike", [row | {"adapted": 2} for row in rows])])
    assert "adapted alike" in tables.summary(alike, "sst2", None)[0]
    assert alike.dense_kind("sst2") == "dense, trained on as long as the others"
    rows += [
        {"name": "dv", "seed": 0, "variant": "Deja Vu", "selector": "dejavu", "results": figures(0.9, 0.5, floor=0.6)}
    ]
    longer = [row | {"adapted": 3 if row["name"] == "lte" else 1} for row in rows]
    unlike = collect([make_points(tmp_path / "unlike", longer)])
    lines = tables.summary(unlike, "sst2", None)
    assert "adapted for 1 epoch, the floor" in lines[0]
    assert lines[1] == (
        "The models were trained further for different lengths, and longer training may help by itself: "
        "1 epoch (floor, on, Deja Vu); "
        "3 epochs (LTE)."
    )
    assert unlike.dense_kind("sst2") == "dense, trained on for 1 epoch"
    for file in (tmp_path / "unlike").glob("*/config.yaml"):
        file.unlink()
    unknown = collect([tmp_path / "unlike"])
    assert "every FFN expert off and adapted, the floor" in tables.summary(unknown, "sst2", None)[0]
    assert unknown.dense_kind("sst2") == "dense, trained on"


def test_a_router_that_ran_every_expert_is_still_a_method(material_of, start, figures):
    material = material_of(start(0), ("LTE", "router", figures(0.95, 0.0)), ("gates", "softmax", figures(0.95, 0.0)))
    assert material.dense("sst2") == {0: 0.90}
    assert [setting.method for setting in material.settings()] == ["LTE", "gates"]


def test_each_start_has_its_own_figure(material_of, figures):
    material = material_of(
        ("LTE", "router", figures(0.895, 0.5)),
        ("LTE", "router", figures(0.905, 0.5, 1)),
        ("MoEfication", "moefication", figures(0.7, 0.5, dense=0.71)),
        ("MoEfication", "moefication", figures(0.7, 0.5, 1, dense=0.73)),
        ("KLA", "kla", figures(0.8, 0.5, 1)),
    )
    assert (
        "The methods start from different dense models, not trained further: 0.9050 ± 0.0071 (LTE, KLA); "
        "0.7200 ± 0.0141 (MoEfication)."
    ) in tables.summary(material, "sst2", None)
    assert column(material, "dense start") == ["0.9050 ± 0.0071", "0.7200 ± 0.0141", "0.9100"]


def test_up_to_means_that_all_below_hold_too(material_of, start, figures):
    def kla(*curve):
        return [("KLA", "kla", figures(hard, sparsity)) for sparsity, hard in curve]

    ends = material_of(start(0), *kla((0.5, 0.9), (0.7, 0.85), (0.8, 0.895), (0.9, 0.8)))
    assert said(ends, "KLA") == (
        "KLA (oracle) loses at most 0.01 up to 50 % FFN sparsity (accuracy 0.9000); at 80 % too, though not in between."
    )
    assert tables.flops(ends, None).rows[1] == ["KLA (oracle)", "5.6 (2.14x, 80 % off, though not at 70 %)"]


def test_a_method_that_fails_at_its_least_sparse_setting(material_of, start, figures):
    material = material_of(start(0), ("KLA", "kla", figures(0.8, 0.5)), ("KLA", "kla", figures(0.9, 0.7)))
    assert said(material, "KLA") == (
        "KLA (oracle) loses at most 0.01 at 70 % FFN sparsity, though more at 50 % (accuracy 0.9000)."
    )


def test_marks_follow_from_the_selector(material_of, figures):
    found = figures(0.9, 0.5)
    selectors = ("kla", "kla", "teal", "wanda", "cats", "narrow", "d2dmoe")
    names = dict(zip(("one", "two (oracle)", "three", "four", "five", "six", "seven"), selectors, strict=True))
    rows = tables.flops(material_of(*((name, selector, found) for name, selector in names.items())), None).rows
    assert [row[0] for row in rows[1:]] == [
        "one (oracle)",
        "two (oracle)",
        "three (skips weights, not neurons)",
        "four (prunes weights, not neurons; cost assumes that zeros are skipped)",
        "five (pays for the whole gate)",
        "six",
        "seven (without its sparsity fine-tuning)",
    ]


def test_one_seed_has_no_spread(material_of, start, figures):
    material = material_of(start(0), ("LTE", "router", figures(0.9, 0.5, floor=0.6)))
    assert "±" not in " ".join(tables.everything(material, "sst2").rows[0] + tables.summary(material, "sst2", None))
    assert column(material, "seeds") == ["0"]
    assert "The spread is unknown for 1 of 1 setting, which have only one seed." in tables.not_run(material)


def test_an_encoder_s_classifier_reads_one_token_of_the_last_layer(make_points, figures, tmp_path):
    found = figures(0.9, 0.6, sparsity_per_layer=[0.3, 0.5, 1.0])
    for name, task in (("yes", "Classification"), ("no", "LanguageModel")):
        folder = make_points(tmp_path / name, [{"name": "a", "seed": 0, "results": found}])
        config = folder / "a" / "config.yaml"
        config.write_text(config.read_text().replace("model:", f"model:\n  class_path: lte_lightning.tasks.{task}"))
    classified = collect([tmp_path / "yes"])
    assert column(classified, "sparsity without the last layer") == ["40.0 %"]
    assert any(
        "reads only the first token of the last layer" in line for line in tables.summary(classified, "sst2", None)
    )
    other = collect([tmp_path / "no"])
    assert "sparsity without the last layer" not in tables.everything(other, "sst2").heads
    assert not any("last layer" in line for line in tables.summary(other, "sst2", None))


@pytest.mark.parametrize(("floor", "is_told"), [(0.895, True), (0.93, True), (0.85, False)])
def test_a_floor_as_good_as_dense_is_told(material_of, start, figures, floor, is_told):
    material = material_of(start(0), ("LTE", "router", figures(0.9, 0.8, floor=floor)))
    assert bool(said_of_floor(material)) == is_told


def said_of_floor(material):
    return [line for line in tables.summary(material, "sst2", None) if "tells no method from another" in line]

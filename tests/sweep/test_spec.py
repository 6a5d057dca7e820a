"""Which fits a sweep file stands for, and what is said of a wrong one."""

import re
from datetime import date

import pytest
import yaml

from lte_lightning.errors import UserError
from lte_lightning.sweep.command import fit_command
from lte_lightning.sweep.spec import read_sweep

ETA = "model.efficiency_weight"


@pytest.fixture
def read(tmp_path):
    """`read(content, ...)` reads a sweep file of that content."""
    (tmp_path / "base.yaml").write_text("model: {}\n")
    (tmp_path / "other.yaml").write_text("model: {}\n")

    def run(content, *args, **more):
        (tmp_path / "trial.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return read_sweep(tmp_path / "trial.yaml", *args, **more)

    return run


BASE = {"configs": ["base.yaml"]}


def options_of(point):
    words = fit_command(point)
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_variants_are_crossed_with_grids_lists_and_seeds(read):
    sweep = read(
        BASE
        | {
            "overrides": {"data.train_rows": 100},
            "seeds": [0, 2],
            "grid": {"data.max_length": [16, 32]},
            "variants": {
                "LTE": {"grid": {ETA: [0.1, 0.5, 1.0]}},
                "floor": {"overrides": {"model.lte.selector": "none"}},
                "short": {"list": [{"stages.router.epochs": 1}, {"stages.router.steps": 5, "stages.router.epochs": 1}]},
            },
        }
    )
    points = sweep.points()
    counts = {name: sum(point.variant == name for point in points) for name in sweep.variants}
    assert counts == {"LTE": 2 * 2 * 3, "floor": 2 * 2, "short": 2 * 2 * 2}
    assert len({point.name for point in points}) == len(points)
    assert all(point.overrides["data.train_rows"] == 100 for point in points)
    (one,) = (p for p in points if p.parameters == {"data.max_length": 32, ETA: 0.5} and p.seed == 2)
    assert one.name.startswith("LTE-max_length=32-efficiency_weight=0.5-s2-")
    assert one.needs == []


def test_a_point_is_a_command_that_one_could_type(read, tmp_path):
    values = {"data.source": "a b", "model.init_from": None, "model.lte": {"expert_size": 8}, "trainer.logger": False}
    (point,) = read(BASE | {"overrides": values, "seeds": [3]}).points()
    assert fit_command(point) == [
        *("fit", "--config", str(tmp_path / "base.yaml"), "--seed_everything", "3"),
        *("--data.source", "a b", "--model.init_from", "null"),
        *("--model.lte", '{"expert_size": 8}', "--trainer.logger", "false"),
    ]


def test_points_of_a_seed_share_one_start_and_one_floor(read):
    sweep = read(
        BASE
        | {
            "overrides": {"data.train_rows": 9},
            "seeds": [0, 1],
            "start": {"overrides": {"stages.dense.learning_rate": 1e-4}},
            "floor": {},
            "grid": {ETA: [0.1, 0.5]},
            "variants": {
                "LTE": {},
                "constant": {"overrides": {"model.separability_start": 0}},
                "own": {"configs": ["other.yaml"], "floor": False},
                "alone": {"start": False, "floor": False},
            },
        }
    )
    points = sweep.points()
    roles = [point.role for point in points]
    assert roles == ["start"] * 4 + ["floor"] * 2 + ["point"] * 16
    by_name = {point.name: point for point in points}
    for point in points:
        if point.role == "point" and point.variant in ("LTE", "constant"):
            start, floor = by_name[point.start], by_name[point.floor]
            assert (start.seed, floor.seed, floor.start) == (point.seed, point.seed, start.name)
            assert point.overrides["stages.dense.epochs"] == 0
            assert [point.overrides["data.train_rows"], start.overrides["data.train_rows"]] == [9, 9]
            given = options_of(start)
            assert (given["--stages.router.epochs"], given["--stages.expert.epochs"]) == ("0", "0")
            assert given["--stages.dense.learning_rate"] == "0.0001"
            assert "--model.separability_start" not in given
            assert options_of(floor)["--model.lte.selector"] == "none"
            assert options_of(floor)["--stages.dense.epochs"] == "0"
        if point.variant == "own":
            assert "other.yaml" in " ".join(by_name[point.start].configs)
            assert point.floor is None
        if point.variant == "alone":
            assert point.needs == []
            assert "stages.dense.epochs" not in point.overrides


def test_the_command_line_comes_last_and_is_part_of_a_point_s_name(read):
    content = BASE | {"start": {}, "overrides": {"data.source": "hub"}}
    theirs, mine = (read(content, extra).points() for extra in ({}, {"data.source": "here", "stages.dense.epochs": 2}))
    assert [point.overrides["data.source"] for point in mine] == ["here", "here"]
    assert not {point.name for point in theirs} & {point.name for point in mine}
    start, point = mine
    assert (start.overrides["stages.dense.epochs"], point.overrides["stages.dense.epochs"]) == (2, 0)
    assert [point.seed for point in read(content, seeds=[7]).points()] == [7, 7]


@pytest.mark.parametrize(
    ("content", "option", "why"),
    [
        ({"grid": {ETA: [0.1, 0.2]}}, ETA, "its grid or list varies it"),
        ({"list": [{ETA: 0.1}]}, ETA, "its grid or list varies it"),
        ({"variants": {"a": {}, "b": {"grid": {ETA: [0.1, 0.2]}}}}, ETA, "its grid or list varies it"),
        ({"grid": {"model.lte": [{"expert_size": 8}]}}, "model.lte.expert_size", "its grid or list varies it"),
        ({"grid": {"model.lte.expert_size": [8]}}, "model.lte", "its grid or list varies it"),
        ({"variants": {"a": {}, "b": {"overrides": {ETA: 1}}}}, ETA, "its variants differ in it"),
        (
            {"start": {}, "variants": {"a": {}, "b": {"start": {"overrides": {"model.activation": "relu"}}}}},
            "model.activation",
            "its starts differ in it",
        ),
        (
            {"floor": {}, "variants": {"a": {}, "b": {"floor": {"overrides": {"stages.expert.epochs": 4}}}}},
            "stages.expert.epochs",
            "its floors differ in it",
        ),
        (
            {"search": {"trials": 1, "parameters": {ETA: {"choices": [1]}}, "objectives": {"hard": "maximize"}}},
            ETA,
            "its search varies it",
        ),
    ],
)
def test_the_command_line_cannot_make_points_of_several_names_one_fit(content, option, why, read):
    assert read(BASE | content, {"model.efficiency_weights": 1, "model.lt": 1}).points() is not None
    with pytest.raises(UserError, match=rf"--{option} cannot be given for all fits of .*trial\.yaml: {why}"):
        read(BASE | content, {option: 0.3})


def test_names_do_not_depend_on_where_the_sweep_lies(read, tmp_path):
    before = [point.name for point in read(BASE | {"grid": {ETA: [1, 2]}, "start": {}}).points()]
    (tmp_path / "sub").mkdir()
    for file in ("trial.yaml", "base.yaml"):
        (tmp_path / file).rename(tmp_path / "sub" / file)
    assert [point.name for point in read_sweep(tmp_path / "sub" / "trial.yaml").points()] == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gird": {}}, "the sweep has no key 'gird'; did you mean grid?"),
        ({"variants": {"a": {"overides": {}}}}, "variant 'a' has no key 'overides'; did you mean overrides?"),
        ({"grid": {}}, "the grid of the sweep is empty"),
        ({"grid": {ETA: []}}, r"model\.efficiency_weight in the grid of the sweep is \[\]; give a list of values"),
        ({"grid": {ETA: 0.5}}, r"is 0\.5; give a list of values"),
        ({"grid": {ETA: [1, 1]}}, "two points are the same fit: fit-efficiency_weight=1-s0"),
        ({"list": []}, r"the list of the sweep is \[\]"),
        ({"variants": {}}, "variants is empty"),
        ({"variants": ["a"]}, r"variants is \['a'\]; it must be a mapping"),
        ({"seeds": []}, r"seeds is \[\]; give a list of whole numbers"),
        ({"seeds": ["a"]}, r"seeds is \['a'\]"),
        ({"configs": ["none.yaml"]}, r"names .*none\.yaml, which is not there; paths are relative to the sweep file"),
        ({"configs": None}, "names no configs"),
        ({"grid": {"run.root": ["a"]}}, r"grid of the sweep sets run\.root; the sweep sets it itself"),
        ({"overrides": {"run": {"floor_from": "x"}}}, r"sets run\.floor_from; the sweep sets it itself"),
        ({"overrides": {"seed_everything": 3}}, "sets seed_everything; give seeds"),
        ({"start": {"epochs": 3}}, "start of the sweep has no key 'epochs'; known are overrides"),
        ({"start": {}, "grid": {"stages.dense.epochs": [1, 2]}}, "cannot differ between points that share one dense"),
        ({"overrides": []}, r"overrides of the sweep is \[\]; it must be a mapping"),
        ({"variants": {"a": []}}, r"variant 'a' is \[\]; it must be a mapping"),
        (
            {"overrides": {"data.day": date(2026, 1, 2)}},
            r"sets data\.day to datetime\.date.*, a date; put it in quotes",
        ),
        ({"grid": {"data.day": [date(2026, 1, 2)]}}, r"grid of the sweep sets data\.day to datetime\.date"),
        ({"overrides": {"epochs": 3}}, "overrides of the sweep sets 'epochs'; options of a fit have a dot in them"),
        ({"search": {"trials": 0}}, "trials of search is 0"),
        ({"search": {"trials": 3}}, "search has no parameters"),
        ({"search": {"trials": 3, "parameters": {ETA: {"low": 1}}}}, r"give low and high \(log, step\), or choices"),
        ({"search": {"trials": 3, "parameters": {ETA: {"low": 0, "high": 1}}}}, "search has no objectives"),
        (
            {"search": {"trials": 3, "parameters": {ETA: {"low": 0, "high": 1}}, "objectives": {"hard": "max"}}},
            "objective hard is 'max'; there are maximize and minimize",
        ),
        (
            {
                "grid": {ETA: [1]},
                "search": {
                    "trials": 3,
                    "parameters": {ETA: {"low": 0, "high": 1}},
                    "objectives": {"hard": "maximize"},
                },
            },
            "a search proposes its points itself",
        ),
    ],
)
def test_what_no_sweep_has(content, message, read):
    with pytest.raises(UserError, match=message):
        read(BASE | content).points()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 0.0, "high": 1.0, "log": True}, "with log low must be above 0"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "give log or step, not both"),
        ({"low": 1, "high": 5, "step": -1}, "step must be above 0"),
        ({"low": 1, "high": 5, "log": "yes"}, "log is true or false"),
        ({"low": 2, "high": 1}, "low is above high"),
        ({"low": "1e-4", "high": 1}, "low, high and step are numbers"),
        ({"low": True, "high": 1}, "low, high and step are numbers"),
        ({"low": 0.0, "high": float("inf")}, "low, high and step are numbers"),
        ({"choices": [{"a": 1}]}, "give choices as a list of numbers and words"),
        ({"choices": []}, "give choices as a list of numbers and words"),
    ],
)
def test_ranges_that_nothing_can_be_drawn_from(given, message, read):
    search = {"trials": 1, "parameters": {ETA: given}, "objectives": {"hard": "maximize"}}
    with pytest.raises(UserError, match=rf"model\.efficiency_weight of search is .*; {message}"):
        read(BASE | {"search": search})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": "x"}, "seed of search is 'x'; give a whole number"),
        ({"storage": 5}, "storage of search is 5; give a text"),
        ({"study": ["a"]}, r"study of search is \['a'\]; give a text"),
        ({"objectives": {"hrad": "maximize"}}, "objective hrad is no figure of a fit; did you mean hard?"),
        ({"objectives": {"task": "maximize"}}, "objective task is no figure of a fit; known are"),
        ({"objectives": {"latency_ms": "minimize"}}, "objective latency_ms needs run.latency_rows in overrides"),
    ],
)
def test_searches_that_cannot_be(more, message, read):
    search = {"trials": 1, "parameters": {ETA: {"low": 1, "high": 2}}, "objectives": {"hard": "maximize"}} | more
    with pytest.raises(UserError, match=message):
        read(BASE | {"search": search})


def test_a_key_that_is_there_twice(read):
    with pytest.raises(UserError, match=r"trial\.yaml is not YAML: the key 'model\.b' is there twice .*line 2"):
        read("configs: [base.yaml]\noverrides: {model.a: 1, model.b: 2, model.b: 3}")
    anchors = "configs: [base.yaml]\nvariants:\n  a: {overrides: &a {x.y: 1}}\n  b: {overrides: {<<: *a, x.y: 2}}"
    assert [point.overrides["x.y"] for point in read(anchors).points()] == [1, 2]


def test_files_that_are_none(read, tmp_path):
    with pytest.raises(UserError, match=r"trial\.yaml is not YAML: .*line 1"):
        read("a: [")
    with pytest.raises(UserError, match=r"trial\.yaml is not YAML: a value does not fit its tag \(KeyError: 'x'\)"):
        read("about: !!bool x")
    with pytest.raises(UserError, match=r"trial\.yaml is not YAML: .*unhashable key"):
        read("? [1, 2]\n: 3")
    for content in ("overrides: &all {model.a: *all}", f"about: {'[' * 2000}{']' * 2000}"):
        with pytest.raises(UserError, match=r"trial\.yaml cannot be read: something in it contains itself, or"):
            read(f"configs: [base.yaml]\n{content}")
    with pytest.raises(UserError, match=r"cannot read the sweep file .*nowhere\.yaml: No such file"):
        read_sweep(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=re.escape("the sweep is None; it must be a mapping")):
        read("")

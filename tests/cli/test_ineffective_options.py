"""Options that have no effect are named, or refused where the meaning would differ."""

import json
import shutil

import pytest
import torch

from lte_lightning.callbacks.resumed import check_settings
from lte_lightning.tasks.base import LteModule


@pytest.fixture(scope="module")
def fit(tiny, lightning, tmp_path_factory):
    outcome = lightning(tmp_path_factory.mktemp("unused"), tiny.config(), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def run(fit, tmp_path):
    shutil.copytree(fit.cwd / "runs", tmp_path / "runs")
    return tmp_path / fit.run.relative_to(fit.cwd)


def without_effect(outcome):
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("options that have no effect here: ")]
    return line.removeprefix("options that have no effect here: ")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model.lte.threshold", 0.3, "model.lte.threshold is 0.3, but {ckpt} was written with 0.5"),
        ("--model.lte.selector", "kla", "model.lte.selector is 'kla', but {ckpt} was written with 'router'"),
        ("--model.layers", 1, "model.layers is 1, but {ckpt} was written with None"),
        ("--model.pretrained", "other", "model.pretrained is 'other', but {ckpt} was written with "),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_what_a_checkpoint_replaces_is_refused(command, option, value, said, run, tiny, lightning, tmp_path):
    last = run / "checkpoints" / "last.ckpt"
    before = sorted(tmp_path.rglob("*"))
    config = tiny.config()
    if option.endswith("selector"):
        config["model"]["init_args"]["lte"]["target_sparsity"] = 0.5
    outcome = lightning(tmp_path, config, command, "--ckpt_path", last, option, value)
    assert outcome.code == 1, outcome.err
    assert said.format(ckpt=last) in outcome.err or "target_sparsity is 0.5" in outcome.err
    assert "--model.init_from RUN/model" in outcome.err
    assert {*tmp_path.rglob("*")} - {*before} <= {tmp_path / "fit.yaml"}


def test_training_goes_on_with_the_weights_of_its_losses(run, tiny, lightning, tmp_path):
    last = run / "checkpoints" / "last.ckpt"
    words = ("--ckpt_path", last, "--model.efficiency_weight", 0.7)
    fit = lightning(tmp_path, tiny.config(), "fit", *words)
    assert fit.code == 1
    assert f"model.efficiency_weight is 0.7, but {last} was written with 1.0, which would be used" in fit.err
    test = lightning(tmp_path, tiny.config(), "test", *words)  # it makes no difference to what is measured
    assert test.code == 0, test.err
    assert without_effect(test) == "model.efficiency_weight (lightning test trains nothing)"


def test_a_checkpoint_says_itself_what_is_left_out(run, tiny, lightning, tmp_path):
    config = tiny.config()
    del config["model"]["init_args"]["lte"], config["model"]["init_args"]["efficiency_weight"]
    test = lightning(tmp_path, config, "test", "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert test.code == 0, test.err
    assert "no effect" not in test.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data.init_args.seed": 5}, "data.seed is 5, but 1 would be used; leave it out (set seed_everything)"),
        ({"model.init_args.seed": 5}, "model.seed is 5, but 1 would be used"),
        ({"stages.seed": 5}, "stages.seed is 5, but 1 would be used"),
        ({"data.init_args.tokenizer": "other"}, "data.tokenizer is 'other', but "),
        ({"model.init_args.task": "other"}, "model.task is 'other', but 'sst2' would be used; leave it out (it is the"),
    ],
)
def test_what_a_link_replaces_is_refused(options, said, tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(**options), "fit")
    assert fit.code == 1, fit.err
    assert said in fit.err
    assert [path.name for path in tmp_path.iterdir()] == ["fit.yaml"]


def test_what_agrees_with_its_link_is_let_pass(tiny, parse, tmp_path):
    options = {"data.init_args.seed": 1, "stages.seed": "${seed_everything}", "model.init_args.task": "sst2"}
    import yaml

    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config(**options)))
    cli = parse("--config", "base.yaml")
    assert cli.datamodule.seed == cli.config_init.stages.seed == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stages.dense.router_learning_rate": 0.1}, "stages.dense.router_learning_rate (the routers are not trained"),
        ({"stages.router.steps": 2}, None),
        ({"stages.router.steps": 2, "stages.router.epochs": 7}, "stages.router.epochs (steps are given)"),
        ({"stages.dense.schedule": "constant", "stages.dense.final": 0.5}, "stages.dense.final (the schedule is"),
        ({"model.init_args.balance_weight": 2.0}, "model.balance_weight (selector router has no balance loss)"),
        (
            {"model.init_args.lte": {"expert_size": 8, "selector": "kla", "target_sparsity": 0.5, "threshold": 0.4}},
            "model.lte.threshold (selector kla chooses without a threshold)",
        ),
        (
            {"model.init_args.lte": {"expert_size": 8, "router_bias": False, "router_margin": 1.0}},
            "model.lte.router_margin (the routers have no bias)",
        ),
        ({"model.init_args.backend": "cpu"}, "model.backend (training computes every expert)"),
    ],
)
def test_what_a_fit_does_not_read_is_named(options, named, tiny, lightning, tmp_path):
    epochs = (1, 0, 0) if "kla" not in str(options) else (1, 0, 1)
    config = tiny.config(epochs=epochs, **{"trainer.limit_train_batches": 1, "model.init_args.efficiency_weight": 0.5})
    for key, value in options.items():
        *path, last = key.split(".")
        inner = config
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    if "stages.router.steps" in options:
        config["stages"]["router"].setdefault("epochs", 0)
        config["stages"]["router"]["epochs"] = options.get("stages.router.epochs", 3)
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    if named is None:
        assert "no effect" not in fit.err
    else:
        assert named in without_effect(fit)


def early_stopping(patience):
    stop = {"monitor": "val/loss", "patience": patience, "strict": False}
    return [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}]


@pytest.fixture(scope="module")
def stopped(tiny, lightning, tmp_path_factory):
    """Stopped in the router stage, after the first of its two epochs."""
    config = tiny.config(epochs=(1, 2, 1), **{"trainer.limit_train_batches": 2, "trainer.max_epochs": 2})
    config["trainer"]["callbacks"] = early_stopping(50)
    outcome = lightning(tmp_path_factory.mktemp("stopped"), config, "fit")
    assert outcome.code == 0, outcome.err
    return outcome, config


@pytest.fixture
def resume(stopped, lightning, tmp_path):
    """`resume(*words)` goes on in a copy of the run's folder, with `about` in its run.json."""

    def go(*words, change=None, **about):
        outcome, config = stopped
        shutil.copytree(outcome.cwd / "runs", tmp_path / "runs")
        last = tmp_path / outcome.run.relative_to(outcome.cwd) / "checkpoints" / "last.ckpt"
        file = last.parents[1] / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | about))
        if change:
            content = torch.load(last, weights_only=True)
            change(content)
            torch.save(content, last)
        return last, lightning(tmp_path, config, "fit", "--ckpt_path", last, "--trainer.max_epochs", 3, *words)

    return go


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stages.router.learning_rate", 0.5), "stages.router.learning_rate is 0.5, but {} was written with 0.005"),
        (("--stages.router.router_learning_rate", 0.5), "router_learning_rate is 0.5, but {} was written with 0.01"),
        (("--stages.router.weight_decay", 0.5), "stages.router.weight_decay is 0.5, but {} was written with 0.0"),
        (
            ("--stages.router.optimizer", "torch.optim.SGD"),
            "stages.router.optimizer is 'torch.optim.sgd.SGD', but {} was written with 'torch.optim.adamw.AdamW'",
        ),
        (
            ("--stages.router.optimizer", "torch.optim.AdamW", "--stages.router.optimizer.betas", "[0.5, 0.6]"),
            "stages.router.optimizer.betas is [0.5, 0.6], but {} was written with [0.9, 0.999]",
        ),
        (
            ("--trainer.accumulate_grad_batches", 2),
            "{} was written with 1 devices and 1 batches of each to a step, and",
        ),
        (("--seed_everything", 99), "seed_everything is 99, but {} was written with 1, in whose order its rows were"),
    ],
)
def test_a_stage_goes_on_as_it_began(words, said, resume):
    last, fit = resume(*words)
    before = sorted(last.parent.iterdir())
    assert fit.code == 1
    assert said.format(last) in fit.err
    assert "Traceback" not in fit.err
    assert sorted(last.parent.iterdir()) == before


def test_a_stage_that_is_over_names_its_options(resume, monkeypatch):
    """Those of the stage that goes on are read at every step, and those of the next one are to come."""
    rates = []

    def watch(self, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(LteModule, "on_before_optimizer_step", watch)
    over = ("--stages.dense.learning_rate", 0.5, "--stages.dense.warmup", 0.5)
    goes_on = ("--stages.router.schedule", "constant", "--stages.expert.learning_rate", 0.5)
    same = ("--stages.router.router_learning_rate", 0.01)  # what None was
    of_run = ("--run.experiment", "other", "--run.name", "other", "--run.root", "runs")
    callbacks = ("--trainer.callbacks", json.dumps(early_stopping(40)), "--stages.keep_optimizer", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:SECRET@nowhere.invalid")
    last, fit = resume(*over, *goes_on, *same, *of_run, *callbacks, tracking_uri="http://theirs.invalid")
    assert fit.code == 0, fit.err
    reason, start = "(the dense stage is over)", "options that have no effect here: "
    of_run, of_stages = (line.removeprefix(start) for line in fit.err.splitlines() if line.startswith(start))
    patience = "EarlyStopping.patience (the checkpoint's 50 is used)"
    assert of_stages == f"{patience}; stages.dense.learning_rate {reason}; stages.dense.warmup {reason}"
    about = json.loads((last.parents[1] / "run.json").read_text())
    kept = f"run.experiment (the run's 'lte' is used); run.name (the run's {about['name']!r} is used)"
    assert of_run == f"MLFLOW_TRACKING_URI (the run's 'http://theirs.invalid' is used); {kept}"
    assert fit.run == last.parents[1]
    assert rates[-1] == 0.005


@pytest.mark.parametrize("switches", [True, False])
def test_a_switch_that_is_over(switches, capsys):
    used = {stage: {"warmup": 0.1, "keep_optimizer": False} for stage in ("dense", "router")}
    now = {stage: values | {"keep_optimizer": True} for stage, values in used.items()}
    check_settings(used, now, "router", switches, "last.ckpt", [])
    named = "options that have no effect here: stages.keep_optimizer (every stage has begun)\n"
    assert capsys.readouterr().err == ("" if switches else named)


def test_a_checkpoint_of_an_earlier_version_says_no_options(resume):
    def change(content):
        (schedule,) = (state for name, state in content["callbacks"].items() if name.startswith("StageSchedule"))
        del schedule["used"]

    _, fit = resume("--stages.dense.learning_rate", 0.5, change=change)
    assert fit.code == 0, fit.err
    assert "no effect" not in fit.err

"""Combinations of options that a user may well type."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.utils.data import BatchSampler, DataLoader

from lte_lightning.callbacks import StageSchedule
from lte_lightning.cli.training import make_cli
from lte_lightning.core.model.config import LteConfig
from lte_lightning.data import GlueData
from lte_lightning.tasks.base import LteModule

CONF = Path(__file__).parents[2] / "conf" / "glue"
HERE = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")


def test_mnli_with_held_out_validation_rows_has_one_set_of_figures(tiny, lightning, tmp_path):
    config = tiny.config("mnli", **{"data.init_args.holdout": 0.25})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert "accuracy_mismatched" not in fit.results
    best = fit.run / "checkpoints" / "best.ckpt"
    test = lightning(tmp_path, config, "test", "--ckpt_path", best)
    figures = json.loads(test.written.read_text())
    assert {"accuracy", "accuracy_mismatched"} <= figures.keys()  # the official sets are the test sets now
    predict = lightning(tmp_path, config, "predict", "--ckpt_path", best)
    rows = [len((predict.run / f"predictions{name}.jsonl").read_text().splitlines()) for name in ("", "_mismatched")]
    assert rows == [12, 9]


def test_a_sanity_check_is_no_result(tiny, lightning, tmp_path):
    config = tiny.config(**{"trainer.max_steps": 1, "data.init_args.eval_batch_size": 2})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    assert fit.results["dense"] is None


def test_weights_that_give_no_finite_validation_loss_are_refused(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(epochs=(1, 0, 0), **{"stages.dense.learning_rate": 1e30}), "fit")
    assert fit.code == 1
    assert "loss is" in fit.err
    assert "stage 'dense'" in fit.err
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_sampler_of_ones_own_is_told_the_epoch(tiny, lightning, tmp_path, monkeypatch):
    """It cannot be begun within a pass, so every stage begins with a new one."""
    told, drawn = [], []

    class Own(BatchSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

        def __iter__(self):
            for batch in super().__iter__():
                drawn.append(batch)
                yield batch

    def loader(self):
        rows = self._ready["train"][0]
        return DataLoader(rows, batch_sampler=Own(range(len(rows)), 8, False), collate_fn=self.collate())

    monkeypatch.setattr(GlueData, "train_dataloader", loader)
    options = {"stages.dense.steps": 3, "stages.router.steps": 9, "stages.expert.steps": 2}
    fit = lightning(tmp_path, tiny.config(**options), "fit")
    assert fit.code == 0, fit.err
    assert told == [0, 100_000, 100_001, 200_000]
    assert [batch[0] // 8 for batch in drawn] == [0, 1, 2, *range(8), 0, 0, 1]


def test_validating_less_often_than_an_epoch_ends(tiny, lightning, tmp_path):
    options = {"stages.dense.steps": 5, "stages.router.steps": 8, "trainer.val_check_interval": 4}
    fit = lightning(tmp_path, tiny.config(**options), "fit")
    assert fit.code == 1
    assert "val_check_interval is 4, but the router stage has an epoch of 3 batches" in fit.err
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*"))


def test_best_is_not_resumed_from(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(), "fit")
    again = lightning(tmp_path, tiny.config(), "fit", "--ckpt_path", fit.run / "checkpoints" / "best.ckpt")
    assert again.code == 1
    assert "resume from last.ckpt" in again.err
    assert fit.results  # still there


def test_a_moved_run_is_tested_without_its_database(tiny, lightning, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    fit = lightning(tmp_path / "here", tiny.config(), "fit")
    about = json.loads((fit.run / "run.json").read_text())
    about |= {"run_id": "0" * 32, "tracking_uri": f"sqlite:///{tmp_path}/gone.db"}
    (fit.run / "run.json").write_text(json.dumps(about))
    run = tmp_path / "there" / "runs" / "lte" / fit.run.name
    shutil.move(fit.run, run)
    test = lightning(tmp_path / "there", tiny.config(), "test", "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert test.code == 0, test.err
    assert test.written == run / "test.json"


def test_clipping_with_a_fused_optimizer_says_what_to_set(tiny, lightning, tmp_path):
    fused = {"class_path": "torch.optim.AdamW", "init_args": {"fused": True}}
    config = tiny.config(**{"trainer.gradient_clip_val": 1.0, "stages.dense.optimizer": fused})
    fit = lightning(tmp_path, config, "fit", "--trainer.precision", "bf16-mixed")
    assert fit.code == 1
    assert "stages.dense.optimizer.init_args.fused" in fit.err
    assert (
        lightning(tmp_path, config, "fit", "--trainer.fast_dev_run", "true").code == 0
    )  # in full precision they agree


@pytest.mark.parametrize("name", ["floor", "constant-lambda"])
def test_overlays_fit_behind_a_config(name, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning"])
    overlay = CONF / "parts" / f"{name}.yaml"
    files = ["--config", str(CONF / "minilm-sst2.yaml"), "--config", str(overlay), "--trainer.logger", "false"]
    cli = make_cli([*files, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"], run=False)
    wanted = yaml.safe_load(overlay.read_text())["model"]["init_args"]
    for key, value in wanted.items():
        assert cli.model.hparams[key] == value or cli.model.hparams[key] | value == cli.model.hparams[key]


def test_straight_through_training_behind_a_config(parse, tiny):
    overlay = CONF.parent / "parts" / "straight-through.yaml"
    target = ("--model.lte.target_sparsity", 0.8)
    files = ("--config", CONF / "minilm-sst2.yaml", "--config", overlay, "--model.pretrained", tiny.model)
    cli = parse(*files, *target, *HERE)
    wanted = yaml.safe_load(overlay.read_text())["model"]["init_args"]
    assert wanted.pop("lte") == {"grouping": cli.model.lte.grouping}
    assert {key: cli.model.hparams[key] for key in wanted} == wanted
    assert cli.model.lte.target_sparsity == 0.8
    assert next(c for c in cli.trainer.callbacks if isinstance(c, StageSchedule)).keep_optimizer


@pytest.mark.parametrize("name", ["quickstart", "own-classifier", "own-chat", "lm/own-text"])
def test_the_papers_stages_behind_the_newer_recipe(name, parse, tiny, tiny_lm):
    """The overlay leaves nothing of the recipe: all is the default again but eta."""
    files = ("--config", CONF.parent / f"{name}.yaml", "--config", CONF.parent / "parts" / "paper.yaml")
    model = tiny.model if name in ("quickstart", "own-classifier") else tiny_lm.model
    cli = parse(*files, "--model.pretrained", model, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    recipe = yaml.safe_load((CONF.parent / f"{name}.yaml").read_text())["model"]["init_args"]
    defaults = {key: value.default for key, value in inspect.signature(LteModule).parameters.items()}
    left = {key: cli.model.hparams[key] for key in recipe if key not in ("pretrained", "metric", "samples", "lte")}
    assert left == {key: defaults[key] for key in left}
    assert cli.model.hparams["efficiency_weight"] == 0.3
    assert cli.model.lte == replace(LteConfig(), seed=cli.model.lte.seed)
    assert not next(c for c in cli.trainer.callbacks if isinstance(c, StageSchedule)).keep_optimizer


@pytest.mark.parametrize("name", ["sparsity", "flops", "bytes"])
def test_the_floor_behind_a_target(name, parse, tiny, capsys):
    files = ("--config", CONF.parent / "own-classifier.yaml", "--config", CONF / "parts" / "floor.yaml")
    target = ("--config", CONF.parent / "parts" / "paper.yaml", f"--model.lte.target_{name}", 0.8)
    cli = parse(*files, *target, *HERE, "--model.pretrained", tiny.model)
    assert not cli.model.lte.has_target
    assert f"model.lte.target_{name} (selector none: without experts the sparsity is 1)" in capsys.readouterr().err


def test_the_beginning_of_an_option_is_not_the_option(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(), "fit", "--stages.dense.epoch", 1)
    assert fit.code == 2
    assert "unknown option --stages.dense.epoch; did you mean --stages.dense.epochs?" in fit.err


def test_the_floor_of_another_task_is_refused(fitted, tiny, lightning, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(fitted.results | {"floor": 0.7, "task": "cola"}))
    fit = lightning(tmp_path, tiny.config(), "fit", "--run.floor_from", "results.json")
    assert fit.code == 1
    assert "a floor of 'cola', this run is on 'sst2'" in fit.err

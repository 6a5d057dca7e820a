"""The options of the command line, their help, and how configurations combine."""

import re
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(path for path in CONF.rglob("*.yaml") if "parts" not in path.parts)

PLAN = [
    "epochs",
    "steps",
    "learning_rate",
    "weight_decay",
    "router_learning_rate",
    "router_weight_decay",
    "warmup",
    "schedule",
    "final",
    "optimizer",
]
OTHER_DATA = ("ClassificationData", "GenerationData", "InstructData", "LanguageModelData", "MmluData")
# A renamed option breaks configurations: change this list only with an entry in the changelog.
OPTIONS = {
    "model": "metric pretrained init_from lte efficiency_weight separability_weight separability_start "
    "separability_end separability_epsilon balance_weight distillation teacher freeze_routers router_training "
    "router_start detach_router sparsity_range activation layers gradient_checkpointing backend sparsity skip_experts "
    "quantize",
    "model.lte": "expert_size grouping selector target_sparsity target_flops target_bytes sparsity_per_layer threshold "
    "router_bias router_margin router_scale wanda_pattern wanda_scope seed",
    "data": "task source max_length batch_size eval_batch_size holdout train_rows",
    "stages": "dense router expert keep_optimizer",
    **{f"stages.{stage}": " ".join(PLAN) for stage in ("dense", "router", "expert")},
    "run": "root experiment name tracking_uri floor_from parent latency_rows mlflow log_model register_as",
}


def test_options_are_these(tiny, lightning, tmp_path):
    printed = lightning(tmp_path, tiny.config(), "fit", "--print_config")
    assert printed.code == 0, printed.err
    config = yaml.safe_load(printed.out)
    found = {
        "model": config["model"]["init_args"],
        "model.lte": config["model"]["init_args"]["lte"],
        "data": config["data"]["init_args"],
        "stages": config["stages"],
        **{f"stages.{stage}": plan for stage, plan in config["stages"].items() if isinstance(plan, dict)},
        "run": config["run"],
    }
    assert {name: " ".join(options) for name, options in found.items()} == OPTIONS


def test_what_print_config_prints_is_a_configuration(tiny, lightning, parse, tmp_path):
    printed = lightning(tmp_path, tiny.config(epochs=(2, 3, 4)), "fit", "--print_config")
    again = lightning(tmp_path, yaml.safe_load(printed.out), "fit", "--print_config")
    assert again.code == 0, again.err
    assert again.out == printed.out
    (tmp_path / "printed.yaml").write_text(printed.out)
    cli = lightning(tmp_path, None, "fit", "--config", "printed.yaml", "--print_config")
    assert cli.out == printed.out


def test_every_option_has_a_help_text(lightning, tmp_path):
    texts = {
        words: lightning(tmp_path, None, "fit", *words)
        for words in (
            ("--help",),
            ("--model.help", "lte_lightning.tasks.Classification"),
            ("--data.help", "lte_lightning.data.GlueData"),
            ("--data.help", "lte_lightning.data.MovieReviews"),
            *(("--model.help", f"lte_lightning.tasks.{name}") for name in ("Generation", "LanguageModel", "Mmlu")),
            *(("--data.help", f"lte_lightning.data.{name}") for name in OTHER_DATA),
        )
    }
    assert {outcome.code for outcome in texts.values()} == {0}
    for words, outcome in texts.items():
        ours = re.findall(r"^  --((?:model|data|stages|run)\.\S+) [A-Z_]+\s+(\S+)", outcome.out, re.MULTILINE)
        assert len(ours) >= 5
        assert [name for name, first_word in ours if first_word.startswith("(")] == [], words
    text = texts[("--help",)].out
    for stage in ("dense", "router", "expert"):
        assert set(re.findall(rf"^  --stages\.{stage}\.(\w+) ", text, re.MULTILINE)) == set(PLAN)
    assert set(re.findall(r"^  --run\.(\w+) ", text, re.MULTILINE)) == set(OPTIONS["run"].split())
    model = texts[("--model.help", "lte_lightning.tasks.Classification")].out  # the arguments behind **kwargs, too
    assert set(OPTIONS["model"].split()) <= set(re.findall(r"^  --model\.(\w+) ", model, re.MULTILINE))


def test_two_files_an_override_and_interpolation_across_them(tiny, parse, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config()))
    overlay = {
        "data": {"init_args": {"eval_batch_size": "${data.init_args.batch_size}"}},
        "run": {"experiment": "${data.init_args.task}"},
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    cli = parse("--config", "base.yaml", "--config", "overlay.yaml", "--data.init_args.batch_size", 4)
    assert (cli.datamodule.batch_size, cli.datamodule.eval_batch_size) == (4, 4)
    assert cli.config_init.run.experiment == "sst2"
    assert cli.datamodule.max_length == 16


def test_an_overlay_may_set_a_single_option(tiny, parse, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config()))
    (tmp_path / "constant.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"separability_start": 0.0}}}))
    module = parse("--config", "base.yaml", "--config", "constant.yaml").model
    assert module.hparams["separability_start"] == 0.0
    assert module.hparams["efficiency_weight"] == 1.0
    assert module.lte.expert_size == 8


def test_what_must_agree_is_said_once(tiny, parse, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny.config("stsb", **{"seed_everything": 7})))
    cli = parse("--config", "base.yaml")
    assert cli.model.hparams["task"] == "stsb"
    assert cli.datamodule.tokenizer.name_or_path == str(tiny.model)
    assert cli.datamodule.seed == 7
    assert cli.model.lte.seed == 7
    assert cli.config_init.stages.seed == 7


def test_there_are_experiments():
    assert EXPERIMENTS


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_experiment_is_instantiated(path, parse):
    cli = parse("--config", path, "--trainer.accelerator", "cpu", "--trainer.devices", 1)
    assert cli.model.hparams["task"] == cli.datamodule.task


# The paper's table of hyper-parameters: rate, batch, epochs of the three stages.
RECIPES = {
    "generation/gpt2-medium-e2e": (5e-5, 8, (3, 1, 1)),
    "generation/gpt2-medium-xsum": (5e-5, 8, (3, 1, 1)),
    "lm/gpt2-medium-wikitext": (5e-5, 8, (3, 1, 3)),
    "generation/llama-7b-e2e": (1.5e-5, 16, (3, 1, 1)),
    "generation/llama-7b-xsum": (1.5e-5, 16, (3, 1, 1)),
    "lm/llama-7b-wikitext": (1.5e-5, 16, (3, 1, 1)),
    "instruct/llama2-7b-tulu": (2e-5, 128, (3, 1, 4)),
    "instruct/llama2-7b-alpaca": (2e-5, 128, (3, 1, 4)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_paper_s_recipes(name, parse):
    rate, batch, epochs = RECIPES[name]
    cli = parse("--config", CONF / f"{name}.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 1)
    plans = list(cli.config_init.stages.plans.values())
    assert [plan.learning_rate for plan in plans] == [rate] * 3
    assert tuple(plan.epochs for plan in plans) == epochs
    assert {(plan.weight_decay, plan.warmup) for plan in plans} == {(0.0, 0.06)}
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == batch

"""What a fit through all three stages leaves behind."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lte_lightning

KEYS = {
    "task", "metric", "dense", "soft", "hard_before", "hard", "sparsity", "sparsity_per_layer", "flops_per_token",
    "dense_flops_per_token", "bytes_per_token", "dense_bytes_per_token", "bound", "data", "sparsity_before", "draws",
    "seconds_per_stage", "grouping", "seed", "versions", "union_sparsity", "options",
}  # fmt: skip


def test_results(fitted):
    results = fitted.results
    assert set(results) == KEYS
    assert (results["task"], results["metric"], results["seed"]) == ("sst2", "accuracy", 1)
    assert all(0 <= results[view] <= 1 for view in ("dense", "soft", "hard_before", "hard"))
    assert results["hard"] >= 0.8
    assert 0 < results["sparsity"] < 1
    assert results["sparsity"] == pytest.approx(sum(results["sparsity_per_layer"]) / 2)
    union = list(results["union_sparsity"].values())
    assert list(results["union_sparsity"]) == ["1", "2", "4", "8", "16"]  # its evaluation has batches of sixteen rows
    # a row needs what any of its tokens does, and more rows need more
    assert results["sparsity"] > union[0] > 0
    assert union == sorted(union, reverse=True)
    # Two layers: attention 4 x 32 x 32, FFN 2 x 32 x 64, router 32 x 8; a multiply-add counts as two.
    attention, ffn, router = (2 * 2 * weights for weights in (4 * 32 * 32, 2 * 32 * 64, 32 * 8))
    assert results["dense_flops_per_token"] == attention + ffn
    sparse = attention + ffn * (1 - results["sparsity"]) + router
    assert results["flops_per_token"] == pytest.approx(sparse, abs=1)
    assert results["bound"] == results["dense_bytes_per_token"] / results["bytes_per_token"] > 1
    assert list(results["seconds_per_stage"]) == ["dense", "grouping", "router", "expert"]
    assert results["versions"]["torch"] == torch.__version__


def test_results_hold_what_was_chosen(fitted):
    """A report asks nothing else what a fit is."""
    options = json.loads((fitted.run / "results.json").read_text())["options"]
    config = yaml.safe_load((fitted.run / "config.yaml").read_text())
    assert options["model.class"] == config["model"]["class_path"].rpartition(".")[2]
    assert options["stages.router.epochs"] == config["stages"]["router"]["epochs"]
    assert options["data.max_length"] == config["data"]["init_args"]["max_length"]
    assert not any("uri" in name for name in options)


def test_its_rows_are_drawn_anew_for_comparisons(fitted):
    draws = fitted.results["draws"]
    assert len(draws) == 100
    assert sum(draws) / 100 == pytest.approx(fitted.results["hard"], abs=0.05)
    assert len(set(draws)) > 3


def test_its_path_is_printed_last_below_a_table(fitted):
    assert fitted.written == fitted.run / "results.json"
    for words in ("dense", "soft routing", "hard, before adaptation", "hard, after adaptation", "FLOPs saved", "Time:"):
        assert words in fitted.out


def test_every_epoch_has_a_line(fitted):
    lines = [line for line in fitted.out.splitlines() if re.match(r"(dense|router|expert) \d/\d: loss \d", line)]
    assert len(lines) == 7
    results = fitted.results
    assert f"dense: accuracy {results['dense']:.4f} (" in lines[1]
    before = f"hard_before: accuracy {results['hard_before']:.4f}, sparsity {results['sparsity_before']:.4f} ("
    assert before in lines[4]
    assert "8 experts x 8 neurons" in fitted.out


def test_the_card_of_its_model(fitted, tiny):
    card, results = ModelCard.load(fitted.run / "model" / "README.md"), fitted.results
    (value,) = card.data.eval_results
    assert (value.dataset_name, value.metric_type) == ("sst2", "accuracy")
    assert value.metric_value == pytest.approx(results["hard"], abs=1e-6)
    flops = results["flops_per_token"] / 2**30
    assert (
        f"| selected experts | {results['hard']:.4f} | {100 * results['sparsity']:.1f} % | {flops:.4f} |" in card.text
    )
    for line in (
        "Data: sst2.",
        f"| base model | {tiny.model.parent.name} |",
        "| efficiency_weight | 1.0 |",
        "| seed | 1 |",
    ):
        assert line in card.text
    assert str(tiny.folder) not in card.content  # it may be published
    config = json.loads((fitted.run / "model" / "lte_config.json").read_text())
    assert str(tiny.folder) not in json.dumps(config)


def test_files_of_the_run(fitted):
    names = {path.name for path in fitted.run.iterdir()}
    files = {"run.json", "config.yaml", "results.json", "sparsity_per_layer.png", "scores.png"}
    assert names - {"artifacts"} == files | {"checkpoints", "model"}
    assert {path.name for path in (fitted.run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    for name in ("sparsity_per_layer.png", "scores.png"):
        assert (fitted.run / name).read_bytes().startswith(b"\x89PNG")


def test_the_model_folder_is_read_by_us_and_by_transformers(fitted):
    folder = fitted.run / "model"
    sentences = ["a good film", "a dull plot , not good at all"]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    model = lte_lightning.from_pretrained(folder).eval()
    assert {ffn.mode for ffn in lte_lightning.core.model.experts.expert_ffns(model).values()} == {"hard"}
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hard = model(**batch).logits
        lte_lightning.core.model.experts.set_mode(model, "dense")
        assert torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-6)
        assert not torch.allclose(hard, plain(**batch).logits, atol=1e-4)


def test_the_kept_configuration_repeats_the_run(fitted, lightning, tmp_path):
    again = lightning(tmp_path, None, "fit", "--config", fitted.run / "config.yaml", "--trainer.logger", "false")
    assert again.code == 0, again.err
    figures = [{**outcome.results, "seconds_per_stage": None, "options": None} for outcome in (fitted, again)]
    assert figures[0] == figures[1]


def test_best_checkpoint_is_the_best_hard_epoch(fitted):
    best = torch.load(fitted.run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["lte"]["stage"] == "expert"
    assert best["epoch"] in (5, 6)
    assert best["lte"]["measured"]["hard"]["accuracy"] == fitted.results["hard"]


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_other_kinds_of_task(task, tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(task), "fit")
    assert fit.code == 0, fit.err
    results = fit.results
    assert (results["task"], results["metric"]) == (task, {"stsb": "pearson", "mnli": "accuracy"}[task])
    if task == "mnli":
        mismatched = results["accuracy_mismatched"]
        assert set(mismatched) == {"dense", "soft", "hard_before", "hard"}
        assert mismatched["hard"] * 9 == pytest.approx(round(mismatched["hard"] * 9))  # nine rows
        assert set(results) == KEYS | {"accuracy_mismatched"}
    predicted = lightning(
        tmp_path, tiny.config(task), "predict", "--model.init_from", fit.run / "model", "--run.root", "predicted"
    )
    assert predicted.code == 0, predicted.err
    names = {"": 12} if task == "stsb" else {"": 12, "_mismatched": 9}
    assert predicted.written.name == "predictions.jsonl"
    for suffix, count in names.items():
        lines = (predicted.written.parent / f"predictions{suffix}.jsonl").read_text().splitlines()
        assert len([json.loads(line)["prediction"] for line in lines]) == count

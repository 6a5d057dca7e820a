"""validate, test and predict, on what a fit left."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import lte_lightning
from lte_lightning.core.model import prepared as sparse


def weights_of(fitted, tmp_path, source):
    """The arguments that take the weights from a copy of the fit's model or checkpoint."""
    if source == "model":
        return ["--model.init_from", shutil.copytree(fitted.run / "model", tmp_path / "model")]
    return ["--ckpt_path", shutil.copy(fitted.run / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")]


@pytest.fixture(params=["model", "checkpoint"])
def weights(request, fitted, tmp_path):
    return weights_of(fitted, tmp_path, request.param)


def test_test_reports_what_the_fit_logged(weights, fitted, tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny.config(), "test", *weights)
    assert outcome.code == 0, outcome.err
    results, found = fitted.results, outcome.results
    assert outcome.written.name == "test.json"
    assert found["accuracy"] == results["hard"]
    for key in (
        "sparsity",
        "sparsity_per_layer",
        "union_sparsity",
        "flops_per_token",
        "dense_flops_per_token",
        "bytes_per_token",
        "bound",
    ):
        assert found[key] == results[key], key
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert dict(rows) == {
        "accuracy": f"{found['accuracy']:.4f}",
        "FFN sparsity": f"{found['sparsity']:.1%}",
        "GFLOPs/token (2^30)": f"{found['flops_per_token'] / 2**30:.4f}",
        "MB/token": f"{found['bytes_per_token'] / 1e6:.3f}",
        "speed-up bound": f"{found['bound']:.2f}x",
    }


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"cpu"}),
        (("--trainer.precision", "bf16-mixed"), {"cpu"}),
        (("--model.backend", "reference"), {"reference"}),
        (("--model.backend", "dense-mask"), set()),
    ],
)
def test_backends(command, options, expected, fitted, tiny, lightning, tmp_path, monkeypatch):
    ran = set()
    monkeypatch.setattr(sparse, "skips", lambda mask_NE, dtype: True)  # which is for fits
    run_experts = sparse.run_experts
    monkeypatch.setattr(sparse, "run_experts", lambda name, *rest: ran.add(name) or run_experts(name, *rest))
    weights = weights_of(fitted, tmp_path, "checkpoint")
    outcome = lightning(tmp_path, tiny.config(), command, *weights, *options, "--trainer.accelerator", "cpu")
    assert outcome.code == 0, outcome.err
    assert ran == expected


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_quantised(command, kind, fitted, tiny, lightning, tmp_path):
    weights, cpu = weights_of(fitted, tmp_path, "checkpoint"), ("--trainer.accelerator", "cpu")
    outcome = lightning(tmp_path, tiny.config(), command, *weights, "--model.quantize", kind, *cpu)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / kind
    model = lte_lightning.from_pretrained(fitted.run / "model", quantize=kind)
    lte_lightning.save_pretrained(
        model, folder, about=json.loads((fitted.run / "model/lte_config.json").read_text())["about"]
    )
    again = lightning(tmp_path, tiny.config(), command, "--model.init_from", folder, *cpu)
    assert again.code == 0, again.err
    if command == "predict":
        return
    for key in ("flops_per_token", "bytes_per_token", "dense_bytes_per_token"):
        assert outcome.results[key] == pytest.approx(fitted.results[key], rel=0.2), key  # another sparsity
    assert outcome.results["dense_flops_per_token"] == fitted.results["dense_flops_per_token"]
    assert again.results["accuracy"] == outcome.results["accuracy"]
    assert again.results["sparsity_per_layer"] == outcome.results["sparsity_per_layer"]


def test_quantised_models_are_not_trained(fitted, tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny.config(), "fit", "--model.quantize", "int8")
    assert outcome.code == 1
    assert "a quantised model cannot be trained" in outcome.err
    folder = tmp_path / "int8"
    model = lte_lightning.from_pretrained(fitted.run / "model", quantize="int8")
    lte_lightning.save_pretrained(
        model, folder, about=json.loads((fitted.run / "model/lte_config.json").read_text())["about"]
    )
    outcome = lightning(tmp_path, tiny.config(epochs=(0, 0, 1)), "fit", "--model.init_from", folder)
    assert outcome.code == 1
    assert "a quantised model cannot be trained" in outcome.err
    outcome = lightning(tmp_path, tiny.config(), "test", "--model.init_from", folder, "--model.quantize", "int2")
    assert outcome.code != 0
    assert "int2" in outcome.err


def test_validate_reports_what_the_fit_logged(weights, fitted, tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny.config(), "validate", *weights)
    assert outcome.code == 0, outcome.err
    for key, value in (("accuracy", fitted.results["hard"]), ("sparsity", fitted.results["sparsity"])):
        (line,) = (line for line in outcome.out.splitlines() if f"val/hard/{key} " in line)
        assert float(line.strip(" │").split()[-1]) == pytest.approx(value, abs=1e-6)


def test_predict_writes_a_row_per_example_in_the_order_of_the_file(weights, fitted, tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny.config(), "predict", *weights, "--data.init_args.eval_batch_size", 8)
    assert outcome.code == 0, outcome.err
    assert outcome.written.name == "predictions.jsonl"
    lines = [json.loads(line) for line in outcome.written.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(len(lines)))
    rows = [line["prediction"] for line in lines]
    model = lte_lightning.from_pretrained(fitted.run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    file = tiny.task("sst2") / "validation.jsonl"
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    with torch.no_grad():
        expected = [
            int(model(**tokenizer(example["sentence"], return_tensors="pt")).logits.argmax()) for example in examples
        ]
    assert rows == expected
    right = sum(row == example["label"] for row, example in zip(rows, examples, strict=True))
    assert right / len(rows) == pytest.approx(fitted.results["hard"])


def test_predict_reads_a_test_file_without_labels(weights, fitted, tiny, lightning, tmp_path):
    folder = shutil.copytree(tiny.task("sst2"), tmp_path / "sst2")
    (folder / "test.jsonl").write_text('{"sentence": "the film was good"}\n{"sentence": "a dull plot"}\n')
    source = ("--data.source", folder)
    outcome = lightning(tmp_path, tiny.config(), "predict", *weights, *source)
    assert outcome.code == 0, outcome.err
    assert len(outcome.written.read_text().splitlines()) == 2
    tested = lightning(tmp_path, tiny.config(), "test", *weights, *source)
    assert json.loads(tested.written.read_text())["accuracy"] == pytest.approx(fitted.results["hard"])


def test_an_evaluation_in_the_runs_folder_keeps_the_fit_s_files(fitted, tiny, lightning, tmp_path):
    copy = shutil.copytree(fitted.run, tmp_path / "runs" / "lte" / fitted.run.name)
    before = (copy / "config.yaml").read_bytes(), (copy / "results.json").read_bytes()
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(about | {"run_id": None, "tracking_uri": None}))
    checkpoint = copy / "checkpoints" / "best.ckpt"
    outcome = lightning(tmp_path, tiny.config(), "test", "--ckpt_path", checkpoint, "--run.experiment", "elsewhere")
    assert outcome.code == 0, outcome.err
    assert ((copy / "config.yaml").read_bytes(), (copy / "results.json").read_bytes()) == before

"""`lte bench --against`: quality beside speed, in a run's folder and in its report."""

import csv
import json
import shutil

import pytest

# OpenVINO and the exporters say much of their own parts when they are first imported
pytestmark = pytest.mark.filterwarnings("ignore")


def rates(folder):
    with (folder / "engines.csv").open(newline="") as file:
        return {(row["engine"], row["dtype"]): row for row in csv.DictReader(file)}


def test_a_classifier(fitted, lightning, tmp_path):
    pytest.importorskip("openvino", reason="the extra bench is not installed")
    run = tmp_path / "run"
    shutil.copytree(fitted.run, run)
    words = ("--against", "openvino", "--dtype", "f32", "--tokens", "2x8", "--ways", "eager", "--repeats", 1)
    outcome = lightning(tmp_path, None, "bench", run, *words)
    assert outcome.code == 0, outcome.err
    results, rows = json.loads((run / "results.json").read_text()), rates(run)
    assert {row["metric"] for row in rows.values()} == {"accuracy"}
    assert float(rows["ours", "f32"]["quality"]) == pytest.approx(results["hard"], abs=1e-3)
    dense = float(rows["dense", "f32"]["quality"])
    assert float(rows["openvino", "f32"]["quality"]) == pytest.approx(dense, abs=0.051)  # one of 20 rows
    assert (run / "engines.png").read_bytes().startswith(b"\x89PNG")
    assert lightning(tmp_path, None, "report", run, "--out", tmp_path / "report").code == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Whole models beside other engines" in page
    assert "Fastest: " in page
    assert (tmp_path / "report" / "engines-0.png").exists()
    outcome = lightning(tmp_path, None, "bench", run / "model", *words, "--data", "nowhere.yaml")
    assert outcome.code == 1
    assert "no file nowhere.yaml" in outcome.err


def test_a_language_model(tiny_lm, lightning, tmp_path):
    for package in ("openvino", "xllamacpp"):
        pytest.importorskip(package, reason="the extra bench is not installed")
    fit = lightning(tmp_path, tiny_lm.config("LanguageModelData"), "fit")
    assert fit.code == 0, fit.err
    words = ("--against", "openvino,llama.cpp", "--dtype", "f32,int8", "--ways", "eager", "--repeats", 1)
    outcome = lightning(tmp_path, None, "bench", fit.run, *words, "--new-tokens", 4)
    assert outcome.code == 0, outcome.err
    results, rows = json.loads((fit.run / "results.json").read_text()), rates(fit.run)
    quality = {key: float(row["quality"]) for key, row in rows.items()}
    assert {row["metric"] for row in rows.values()} == {"perplexity"}
    assert quality["ours", "f32"] == pytest.approx(results["hard"], rel=1e-3)
    assert quality["llama.cpp", "f32"] == pytest.approx(quality["dense", "f32"], rel=1e-3)
    assert quality["openvino", "f32"] == pytest.approx(quality["dense", "f32"], rel=0.01)
    assert quality["llama.cpp", "int8"] == pytest.approx(quality["dense", "f32"], rel=0.05)

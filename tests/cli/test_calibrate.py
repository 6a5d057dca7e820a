"""`lte calibrate`: a knob for a saved model, and the commands that turn it."""

import csv
import json
import shutil

import pytest
import yaml

from lte_lightning.core.model.thresholds import THRESHOLDS_FILE


@pytest.fixture
def run(fitted, tmp_path):
    """A copy of a finished run's folder, that a test may change."""
    shutil.copytree(fitted.run, tmp_path / "run")
    return tmp_path / "run"


def sparsity_of(folder, lightning, cwd, *words):
    """The FFN sparsity that `lightning test` finds on the validation rows."""
    options = ("--config", folder / "config.yaml", "--model.init_from", folder / "model", "--trainer.logger", "false")
    outcome = lightning(cwd, None, "test", *options, *words)
    assert outcome.code == 0, outcome.err
    (found,) = sorted(folder.glob("test*.json"), key=lambda path: path.stat().st_mtime)[-1:]
    return json.loads(found.read_text())["sparsity"]


def test_a_run_is_calibrated_and_tested(run, lightning, tmp_path):
    before = sparsity_of(run, lightning, tmp_path)
    outcome = lightning(tmp_path, None, "calibrate", run, "--sparsity", "0.4,0.8")
    assert outcome.code == 0, outcome.err
    assert f"wrote {run / 'model' / THRESHOLDS_FILE}" in outcome.out
    table = json.loads((run / "model" / THRESHOLDS_FILE).read_text())
    assert [setting["sparsity"] for setting in table["settings"]] == [0.4, 0.8]
    assert table["rows"] == str(run / "config.yaml")
    assert sparsity_of(run, lightning, tmp_path) == before  # loading is unchanged
    for sparsity in (0.4, 0.6, 0.8):
        found = sparsity_of(run, lightning, tmp_path, "--model.sparsity", sparsity)
        assert found == pytest.approx(sparsity, abs=0.08)  # on 20 other rows


@pytest.mark.parametrize("layers", ["equal", "least-loss"])
def test_ways_to_share_out(layers, run, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "calibrate", run, "--sparsity", "0.6", "--layers", layers)
    assert outcome.code == 0, outcome.err
    (setting,) = json.loads((run / "model" / THRESHOLDS_FILE).read_text())["settings"]
    assert setting["reached"] == pytest.approx(0.6, abs=0.01)
    if layers == "equal":
        assert setting["per_layer"] == pytest.approx([0.6, 0.6], abs=0.02)


def test_a_language_model_by_a_text(tiny_lm, lightning, tmp_path):
    fit = lightning(tmp_path, tiny_lm.config("LanguageModelData"), "fit")
    assert fit.code == 0, fit.err
    shutil.copytree(fit.run / "model", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat eats the fish\nthe dog eats the bird\n" * 60)
    outcome = lightning(tmp_path, None, "calibrate", "model", "--sparsity", "0.7", "--data", "text.txt")
    assert outcome.code == 0, outcome.err
    written = lightning(tmp_path, None, "generate", "model", "--prompt", "the cat", "--sparsity", "0.7")
    assert written.code == 0, written.err
    assert "FFN sparsity" in written.err
    refused = lightning(tmp_path, None, "generate", "model", "--prompt", "the cat", "--sparsity", "0.9")
    assert refused.code == 1
    assert "sparsity is 0.9, and the model was calibrated for only 0.7" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "0.5,1"), "--sparsity is 0.5,1; give shares above 0 and below 1"),
        (("--sparsity", "half"), "--sparsity is half"),
        (("--layers", "some"), "--layers is 'some'; there are free, equal, least-loss"),
        (("--tokens", "0"), "--tokens is 0"),
        (("--data", "none.yaml"), "no file none.yaml"),
        (("--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_wrong_options(words, message, run, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "calibrate", run, *words)
    assert outcome.code == 1
    assert message in outcome.err
    assert not (run / "model" / THRESHOLDS_FILE).exists()


def test_wrong_folders(run, tiny, lightning, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "is no folder of a saved LTE model"), ("gone", "is no folder of a saved")):
        outcome = lightning(tmp_path, None, "calibrate", folder)
        assert (outcome.code, message in outcome.err) == (1, True)
    shutil.move(run / "model", tmp_path / "alone")
    outcome = lightning(tmp_path, None, "calibrate", "alone")
    assert (outcome.code, "name them with --data" in outcome.err) == (1, True)
    soft = lightning(tmp_path, tiny.config(epochs=(1, 1, 0)), "fit")
    outcome = lightning(tmp_path, None, "calibrate", soft.run)
    assert (outcome.code, "train its expert stage first" in outcome.err) == (1, True)


def test_a_selector_without_a_threshold(tiny, lightning, tmp_path):
    lte = {"expert_size": 8, "selector": "kla", "target_sparsity": 0.5}
    fit = lightning(tmp_path, tiny.config(epochs=(1, 0, 1), **{"model.init_args.lte": lte}), "fit")
    outcome = lightning(tmp_path, None, "calibrate", fit.run)
    assert (outcome.code, "selector 'kla' chooses without a threshold" in outcome.err) == (1, True)


def test_without_a_table_there_is_no_knob(run, lightning, tmp_path):
    options = ("--config", run / "config.yaml", "--model.init_from", run / "model", "--trainer.logger", "false")
    outcome = lightning(tmp_path, None, "test", *options, "--model.sparsity", "0.5")
    assert (outcome.code, "no table of thresholds" in outcome.err) == (1, True)


def test_a_fit_has_another_option(tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny.config(**{"model.init_args.sparsity": 0.5}), "fit")
    assert outcome.code == 1
    assert "for a fit, set model.lte.target_sparsity" in " ".join(outcome.err.split())


def test_a_fit_begins_at_the_trained_threshold(run, lightning, tmp_path):
    """Where the knob of the saved model stood does not change what is trained from it."""
    lightning(tmp_path, None, "calibrate", run, "--sparsity", "0.4,0.9")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stages"] |= {"dense": {"epochs": 0}, "router": {"epochs": 0}}
    config["model"]["init_args"]["init_from"] = str(run / "model")
    config["trainer"]["logger"] = False
    found = []
    for chosen in (None, 0.9):
        path = run / "model" / THRESHOLDS_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chosen": chosen}))
        (tmp_path / f"{chosen}").mkdir()
        fit = lightning(tmp_path / f"{chosen}", config, "fit")
        assert fit.code == 0, fit.err
        found.append(json.loads((fit.run / "results.json").read_text()))
        assert not (fit.run / "model" / THRESHOLDS_FILE).exists()  # it was of other weights
    assert found[0]["hard"] == found[1]["hard"]
    assert found[0]["sparsity"] == found[1]["sparsity"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_curve_of_a_classifier(run, lightning, tmp_path):
    lightning(tmp_path, None, "calibrate", run, "--sparsity", "0.3,0.8")
    outcome = lightning(tmp_path, None, "curve", run, "--sparsity", "0.3,0.5,0.8", "--out", "it.png")
    assert outcome.code == 0, outcome.err
    points = table(tmp_path / "it.csv")
    assert [point["setting"] for point in points] == ["dense", "trained", "0.3", "0.5", "0.8"]
    results = json.loads((run / "results.json").read_text())
    assert float(points[0]["accuracy"]) == pytest.approx(results["dense"], abs=0.2)  # adapted since
    assert float(points[1]["accuracy"]) == pytest.approx(results["hard"])
    assert float(points[1]["sparsity"]) == pytest.approx(results["sparsity"])
    for point in points[2:]:
        assert float(point["sparsity"]) == pytest.approx(float(point["setting"]), abs=0.08)
    flops = [float(point["gflops_per_token"]) for point in points]
    assert flops[2] > flops[3] > flops[4]
    assert all(float(point["tokens_per_second"]) > 0 for point in points)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_of_a_language_model(tiny_lm, lightning, tmp_path):
    fit = lightning(tmp_path, tiny_lm.config("LanguageModelData"), "fit")
    assert lightning(tmp_path, None, "calibrate", fit.run, "--sparsity", "0.5,0.7").code == 0
    outcome = lightning(tmp_path, None, "curve", fit.run, "--out", "it.svg", "--rows", 2)
    assert outcome.code == 0, outcome.err
    points = table(tmp_path / "it.csv")
    assert [point["setting"] for point in points] == ["dense", "trained", "0.5", "0.7"]
    assert all(float(point["perplexity"]) > 1 for point in points)
    assert "<svg" in (tmp_path / "it.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "was not calibrated, so it has one sparsity; run lte calibrate"),
        (("--out", "it.txt"), "name a picture, .png or .svg"),
        (("--out", "none/it.png"), "to write it.png to"),
        (("--rows", 0), "--rows is 0"),
        (("--sparsity", "2"), "--sparsity is 2"),
    ],
)
def test_curves_that_cannot_be(words, message, run, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "curve", run, *words)
    assert (outcome.code, message in " ".join(outcome.err.split())) == (1, True), outcome.err
    assert list(tmp_path.glob("*.csv")) == []

"""A target sparsity for LTE's own router, from the command line."""

import json

import pytest


def controlled(tiny, target, epochs=(1, 2, 2), **more):
    lte = {"expert_size": 4, "target_sparsity": target}
    return tiny.config(epochs=epochs, **{"model.init_args.lte": lte, "model.init_args.efficiency_weight": None, **more})


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8, 0.9])
def test_the_target_is_reached(target, tiny, lightning, tmp_path):
    fit = lightning(tmp_path, controlled(tiny, target), "fit")
    assert fit.code == 0, fit.err
    results = json.loads((fit.run / "results.json").read_text())
    # 20 rows of validation are another sample than the training rows that control looks at.
    assert results["sparsity"] == pytest.approx(target, abs=0.04)


def test_without_it_the_same_fit_runs_every_expert(tiny, lightning, tmp_path):
    config = controlled(tiny, None, **{"model.init_args.efficiency_weight": 0.0})
    fit = lightning(tmp_path, config, "fit")
    assert json.loads((fit.run / "results.json").read_text())["sparsity"] < 0.1


def test_two_dials_are_refused(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, controlled(tiny, 0.5, **{"model.init_args.efficiency_weight": 0.3}), "fit")
    assert fit.code != 0
    assert "target_sparsity 0.5 and efficiency_weight 0.3 both set the sparsity" in " ".join(fit.err.split())


def test_it_needs_the_bias(tiny, lightning, tmp_path):
    config = controlled(tiny, 0.5, **{"model.init_args.lte.router_bias": False})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code != 0
    assert "needs the routers' biases, but router_bias is false" in " ".join(fit.err.split())


def test_a_budget_in_flops_is_met(tiny, lightning, tmp_path, caplog):
    config = controlled(tiny, None, **{"model.init_args.lte.target_flops": 0.85})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    results = json.loads((fit.run / "results.json").read_text())
    assert results["flops_per_token"] / results["dense_flops_per_token"] == pytest.approx(0.85, abs=0.02)
    assert f"target_flops 0.85 of the dense model's is a sparsity of {results['target_sparsity']:.4f}" in caplog.text


def test_a_budget_and_eta_are_refused(tiny, lightning, tmp_path):
    config = controlled(tiny, None, **{"model.init_args.lte.target_bytes": 0.8, "model.init_args.efficiency_weight": 1})
    fit = lightning(tmp_path, config, "fit")
    assert fit.code != 0
    assert "lte.target_bytes 0.8 and efficiency_weight 1.0 both set the sparsity" in " ".join(fit.err.split())

"""Baselines as ordinary fits."""

import json

import pytest
import torch
from torch.nn import functional
from transformers import BertTokenizerFast

from lte_lightning.core.accounting.cost import flops_per_token
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.model.loading import from_pretrained

LEARNED = ("d2dmoe", "dejavu", "moefication")


@pytest.fixture(scope="module")
def dense(tiny, lightning, tmp_path_factory):
    """A fine-tuned model that the baselines start from."""
    outcome = lightning(tmp_path_factory.mktemp("dense"), tiny.config(epochs=(2, 0, 0)), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize("name", ["kla", "cats", "narrow", "random", "teal", "wanda", *LEARNED])
def test_a_baseline_reaches_the_sparsity_it_is_asked_for(name, dense, tiny, lightning, tmp_path):
    lte = {"expert_size": 1 if name in ("kla", "dejavu", "teal") else 8, "selector": name, "target_sparsity": 0.5}
    config = tiny.config(
        epochs=(0, int(name in LEARNED), 1),
        **{"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")},
    )
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    results = fit.results
    exact = name not in ("cats", "d2dmoe", "teal")  # a level is met on average, on rows that adapt to it
    assert results["sparsity_before"] == pytest.approx(0.5, abs=1e-6 if exact else 0.03)
    assert results["hard_before"] is not None
    assert results["hard"] is not None
    saved = from_pretrained(fit.run / "model")
    assert results["flops_per_token"] == flops_per_token(saved, results["sparsity_per_layer"])
    tested = lightning(tmp_path, config, "test", "--ckpt_path", fit.run / "checkpoints" / "best.ckpt")
    assert tested.code == 0, tested.err


def test_options_of_routers_change_nothing_of_a_baseline(dense, tiny, lightning, tmp_path):
    lte = {"expert_size": 8, "selector": "dejavu", "target_sparsity": 0.5}
    given = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    recipe = {"router_training": "straight-through", "router_start": "closed-form", "sparsity_range": [0.3, 0.9]}
    found = []
    for name, options in (("plain", {}), ("recipe", {f"model.init_args.{key}": recipe[key] for key in recipe})):
        (tmp_path / name).mkdir()
        fit = lightning(tmp_path / name, tiny.config(epochs=(0, 1, 1), **given, **options), "fit")
        assert fit.code == 0, fit.err
        found.append(torch.load(fit.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(value.equal(found[1][key]) for key, value in found[0].items())


def test_a_baseline_without_validation(dense, tiny, lightning, tmp_path, caplog):
    lte = {"expert_size": 8, "selector": "cats", "target_sparsity": 0.5}
    given = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    given |= {"model.init_args.detach_router": True, "model.init_args.sparsity_range": [0.3, 0.9]}  # of LTE's routers
    fit = lightning(tmp_path, tiny.config(epochs=(0, 0, 1), **given, **{"trainer.limit_val_batches": 0}), "fit")
    assert fit.code == 0, fit.err
    said = "'cats' has none of LTE's routers; without effect: detach_router True, sparsity_range [0.3, 0.9]"
    assert said in caplog.text
    assert (fit.results["hard_before"], fit.results["hard"]) == (None, None)


def test_training_a_predictor_changes_nothing_else(dense, tiny, lightning, tmp_path):
    lte = {"expert_size": 8, "selector": "moefication", "target_sparsity": 0.5}
    config = tiny.config(
        epochs=(0, 1, 0), **{"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    )
    fit = lightning(tmp_path, config, "fit")
    assert fit.code == 0, fit.err
    before, after = from_pretrained(dense.run / "model"), from_pretrained(fit.run / "model")
    was, now = ({name: v.flatten().sort().values for name, v in m.state_dict().items()} for m in (before, after))
    changed = {name for name, values in now.items() if not values.equal(was.get(name, values + 1))}
    assert changed == {name for name in now if ".selector." in name}  # grouping reorders neurons, and no more


def test_a_swapped_activation_is_saved(tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(epochs=(1, 0, 0), **{"model.init_args.activation": "relu"}), "fit")
    assert fit.code == 0, fit.err
    assert from_pretrained(fit.run / "model").config.hidden_act == "relu"


@pytest.mark.parametrize(
    ("lte", "message"),
    [
        ({"selector": "kla"}, "needs the share of the experts that shall not run"),
        ({"selector": "kla", "target_sparsity": 1.0}, "below 1"),
        ({"selector": "router", "target_sparsity": 0.5}, "both set the sparsity"),
    ],
)
def test_the_sparsity_asked_for(lte, message, tiny, lightning, tmp_path):
    fit = lightning(tmp_path, tiny.config(**{"model.init_args.lte": lte}), "fit")
    assert fit.code in (1, 2)
    assert message in " ".join(fit.err.split())


def test_what_is_calibrated_needs_an_expert_stage(dense, tiny, lightning, tmp_path):
    lte = {"expert_size": 8, "selector": "d2dmoe", "target_sparsity": 0.5}
    model = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    fit = lightning(tmp_path, tiny.config(epochs=(0, 1, 0), **model), "fit")
    assert fit.code == 1
    assert "calibrated when the expert stage begins" in fit.err


def test_the_activation_of_a_trained_model_stays(dense, tiny, lightning, tmp_path):
    swap = {"model.init_args.activation": "relu", "model.init_args.init_from": str(dense.run / "model")}
    fit = lightning(tmp_path, tiny.config(epochs=(0, 1, 1), **swap), "fit")
    assert fit.code == 1
    assert "was trained with activation 'gelu', and activation says 'relu'" in fit.err


def test_levels_are_those_of_the_training_rows(dense, tiny, lightning, tmp_path):
    texts = {"train": "the film was good", "validation": "dog sat in it and ran"}
    (tmp_path / "rows").mkdir()
    for split, text in texts.items():
        rows = [{"sentence": text, "label": i % 2} for i in range(16)]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {
        "model.init_args.lte": {"expert_size": 8, "selector": "cats", "target_sparsity": 0.5},
        "model.init_args.init_from": str(dense.run / "model"),
        "data.init_args.source": str(tmp_path / "rows"),
        "stages.expert.learning_rate": 0.0,  # the weights stay those that were calibrated
    }
    fit = lightning(tmp_path, tiny.config(epochs=(0, 0, 1), **model), "fit")
    assert fit.code == 0, fit.err

    calibrated, tokenizer = from_pretrained(fit.run / "model").eval(), BertTokenizerFast.from_pretrained(tiny.model)
    set_mode(calibrated, "hard")
    ffns, given, levels = list(expert_ffns(calibrated).values()), {}, {}
    for ffn in ffns:
        ffn.register_forward_pre_hook(lambda ffn, inputs: given.update({ffn: inputs[0][0]}))
    for split, text in texts.items():
        with torch.no_grad():
            calibrated(**tokenizer(text, return_tensors="pt"))
            masses = [functional.gelu(ffn.up(given[ffn])).abs().unflatten(1, (-1, 8)).sum(2).flatten() for ffn in ffns]
        levels[split] = [float(mass.sort().values[len(mass) // 2 - 1]) for mass in masses]
    assert [float(ffn.selector.level) for ffn in ffns] == pytest.approx(levels["train"], rel=1e-4)
    assert levels["validation"] != pytest.approx(levels["train"], rel=1e-2)


def test_more_adaptation_keeps_the_calibration(dense, tiny, lightning, tmp_path):
    lte = {"expert_size": 8, "selector": "cats", "target_sparsity": 0.5}
    model = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    (tmp_path / "first").mkdir()
    first = lightning(tmp_path / "first", tiny.config(epochs=(0, 0, 1), **model), "fit")
    again = {"model.init_args.lte": None, "model.init_args.init_from": str(first.run / "model")}
    (tmp_path / "second").mkdir()
    second = lightning(tmp_path / "second", tiny.config(epochs=(0, 0, 1), **again), "fit")
    assert second.code == 0, second.err
    assert second.results["hard_before"] == first.results["hard_before"]
    levels = [from_pretrained(fit.run / "model").state_dict() for fit in (first, second)]
    names = [name for name in levels[0] if name.endswith("selector.level")]
    assert names
    assert all(levels[0][name].equal(levels[1][name]) for name in names)


def zeros_of(run):
    """Where the weights of a saved model are 0, those of its layers' projections."""
    weights = from_pretrained(run / "model").state_dict()
    return {name: value == 0 for name, value in weights.items() if "encoder.layer" in name and value.dim() == 2}


WANDA = {"selector": "wanda", "target_sparsity": 0.5, "wanda_pattern": "2:4", "wanda_scope": "layers"}


def test_what_wanda_prunes_stays_pruned(dense, tiny, lightning, tmp_path):
    model = {"model.init_args.lte": WANDA, "model.init_args.init_from": str(dense.run / "model")}
    first = lightning(tmp_path, tiny.config(epochs=(0, 0, 1), **model), "fit")
    assert first.code == 0, first.err
    assert first.results["sparsity"] == first.results["sparsity_before"] == 0.5
    assert 2 * first.results["flops_per_token"] == first.results["dense_flops_per_token"]
    zeros = zeros_of(first.run)
    assert {int(zero.sum()) * 2 == zero.numel() for zero in zeros.values()} == {True}

    counted = lightning(tmp_path, None, "cost", "--model", first.run / "model", "--json")
    assert json.loads(counted.out)["bytes_per_token"]["sparse"] == first.results["bytes_per_token"]

    again = {"model.init_args.lte": None, "model.init_args.init_from": str(first.run / "model")}
    (tmp_path / "more").mkdir()
    more = lightning(tmp_path / "more", tiny.config(epochs=(0, 0, 1), **again), "fit")
    assert more.code == 0, more.err
    assert all(zero.equal(zeros[name]) for name, zero in zeros_of(more.run).items())
    before, after = (from_pretrained(run / "model").state_dict() for run in (first.run, more.run))
    assert not any(before[name].equal(after[name]) for name in zeros)


@pytest.mark.parametrize("lte", [WANDA, {"selector": "teal", "expert_size": 1, "target_sparsity": 0.5}])
def test_adaptation_that_was_interrupted_goes_on_as_if_not(lte, dense, tiny, lightning, tmp_path, break_at):
    model = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
    config = tiny.config(epochs=(0, 0, 2), **model)
    (tmp_path / "whole").mkdir()
    whole = lightning(tmp_path / "whole", config, "fit")
    assert whole.code == 0, whole.err
    break_at(11, RuntimeError("power cut"))  # of eight steps an epoch
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, config, "fit")
    break_at(-1, RuntimeError())
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    resumed = lightning(tmp_path, config, "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    mine, theirs = (from_pretrained(run / "model").state_dict() for run in (resumed.run, whole.run))
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []

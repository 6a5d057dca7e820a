"""Options of how LTE's routers are trained: each has its effect, and all go on from a checkpoint bit for bit."""

import json

import pytest
import torch

TARGET = 0.7
LTE = {"expert_size": 4, "target_sparsity": TARGET}
ALL = {
    "model.init_args.router_training": "straight-through",
    "model.init_args.router_start": "closed-form",
    "model.init_args.detach_router": True,
    "model.init_args.distillation": 0.5,
    "model.init_args.sparsity_range": [0.4, 0.8],
    "model.init_args.separability_weight": 0.0,
    "stages.keep_optimizer": True,
}


def config_of(tiny, epochs=(1, 2, 1), lte=None, **more):
    options = {"model.init_args.lte": LTE | (lte or {}), "model.init_args.efficiency_weight": None}
    return tiny.config(epochs=epochs, **options, **more)


def last(outcome):
    return torch.load(outcome.run / "checkpoints" / "last.ckpt", weights_only=True)


def results(outcome):
    return json.loads((outcome.run / "results.json").read_text())


def differing(mine, theirs):
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.fixture(scope="module")
def plain(tiny, lightning, tmp_path_factory):
    outcome = lightning(tmp_path_factory.mktemp("plain"), config_of(tiny), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def everything(tiny, lightning, tmp_path_factory):
    outcome = lightning(tmp_path_factory.mktemp("everything"), config_of(tiny, **ALL), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize(
    "option",
    [
        {"model.init_args.router_training": "straight-through"},
        {"model.init_args.router_start": "closed-form"},
        {"model.init_args.detach_router": True},
        {"model.init_args.sparsity_range": [0.5, 0.9]},
        {"stages.keep_optimizer": True},
        {"model.init_args.lte.sparsity_per_layer": "free"},
        {"model.init_args.lte.grouping": "use"},
    ],
    ids=lambda option: next(iter(option)).rpartition(".")[2],
)
def test_each_option_trains_another_model_at_the_target(option, plain, tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, config_of(tiny, **option), "fit")
    assert outcome.code == 0, outcome.err
    assert differing(last(outcome)["state_dict"], last(plain)["state_dict"]) != []
    assert results(outcome)["sparsity"] == pytest.approx(TARGET, abs=0.05)  # 20 rows


def test_together_they_reach_the_target(everything):
    assert results(everything)["sparsity"] == pytest.approx(TARGET, abs=0.05)
    assert results(everything)["soft"] is None  # the routers' stage never runs all experts
    assert results(everything)["hard_before"] is not None


@pytest.mark.parametrize("step", [11, 19, 27])  # in the first router epoch, in the second, in the expert stage
def test_a_resumed_fit_ends_in_the_same_weights(step, everything, tiny, lightning, tmp_path, break_at):
    break_at(step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, config_of(tiny, **ALL), "fit")
    break_at(-1, RuntimeError())
    (ckpt,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    resumed = lightning(tmp_path, config_of(tiny, **ALL), "fit", "--ckpt_path", ckpt)
    assert resumed.code == 0, resumed.err
    assert differing(last(resumed)["state_dict"], last(everything)["state_dict"]) == []
    assert torch.equal(last(resumed)["lte"]["threshold_logits"], last(everything)["lte"]["threshold_logits"])


def test_layers_may_be_given(tiny, lightning, tmp_path):
    outcome = lightning(tmp_path, config_of(tiny, lte={"sparsity_per_layer": [0.6, 0.8]}), "fit")
    assert outcome.code == 0, outcome.err
    assert results(outcome)["sparsity_per_layer"] == pytest.approx([0.6, 0.8], abs=0.08)


def test_a_closed_form_begins_at_the_target(tiny, lightning, tmp_path):
    options = {"model.init_args.router_start": "closed-form", "stages.expert.learning_rate": 0.0}
    outcome = lightning(tmp_path, config_of(tiny, epochs=(1, 0, 1), **options), "fit")
    assert outcome.code == 0, outcome.err
    assert results(outcome)["sparsity"] == pytest.approx(TARGET, abs=0.05)


def test_routers_in_closed_form_keep_their_start_unless_told_otherwise(tiny, lightning, tmp_path):
    def routers(name, **rate):
        start = {"model.init_args.router_start": "closed-form", **rate}
        folder = tmp_path / name
        folder.mkdir()
        outcome = lightning(folder, config_of(tiny, **start), "fit")
        assert outcome.code == 0, outcome.err
        weights = last(outcome)["state_dict"]
        return torch.cat([weights[key].flatten() for key in sorted(weights) if key.endswith("selector.weight")])

    rate = "stages.router.router_learning_rate"
    start = routers("start", **{rate: 0.0})
    assert 0.0 < (routers("default") - start).abs().max() < 0.005
    assert (routers("as-at-random", **{rate: 0.01}) - start).abs().max() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.init_args.lte.target_sparsity": None, **ALL}, "sparsity_range needs a sparsity to begin from"),
        (
            {"model.init_args.lte.target_sparsity": None, "model.init_args.router_start": "closed-form"},
            "router_start closed-form needs a sparsity to begin from",
        ),
        ({"model.init_args.sparsity_range": [0.2, 0.5]}, "does not contain target_sparsity 0.7"),
        ({"model.init_args.sparsity_range": [0.9, 0.5]}, "it must be [low, high] with 0.05 <= low < high <= 0.95"),
    ],
)
def test_what_does_not_go_together(options, message, tiny, lightning, tmp_path):
    fit = lightning(tmp_path, config_of(tiny, **options), "fit")
    assert fit.code == 1
    assert message in " ".join(fit.err.split())

"""Fits of what is trained with the task besides LTE's routers, and the ablations that are options."""

import pytest
from safetensors.torch import load_file

from lte_lightning.core.accounting.cost import flops_per_token
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.tasks import Classification

GATES = {name: {"expert_size": 8, "selector": name, "target_sparsity": 0.5} for name in ("softmax", "sigmamoe")}


@pytest.fixture(scope="module")
def dense(tiny, lightning, tmp_path_factory):
    """A fine-tuned model to start from."""
    outcome = lightning(tmp_path_factory.mktemp("dense"), tiny.config(epochs=(2, 0, 0)), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def fit(dense, tiny, lightning, tmp_path):
    """`fit(lte, epochs, *args, name=..., **options)` goes on from the dense model."""

    def fit(lte, epochs, *args, name="fit", **options):
        (tmp_path / name).mkdir(exist_ok=True)
        model = {"model.init_args.lte": lte, "model.init_args.init_from": str(dense.run / "model")}
        return lightning(tmp_path / name, tiny.config(epochs=(0, *epochs), **model, **options), "fit", *args)

    return fit


def routers(outcome):
    return load_file(outcome.run / "model" / "lte_routers.safetensors")


def figures(outcome):
    return {key: outcome.results[key] for key in ("soft", "hard_before", "hard", "sparsity", "sparsity_per_layer")}


@pytest.mark.parametrize("lte", GATES.values(), ids=GATES)
def test_gates_learn_with_the_task_and_are_frozen_then(lte, fit):
    with pytest.warns(UserWarning, match="the routers are as they were initialised"):
        untrained = fit(lte, (0, 1), name="untrained")
    routed = fit(lte, (1, 0), name="routed")
    both = fit(lte, (1, 1), name="both")
    for outcome in (untrained, routed, both):
        assert outcome.code == 0, outcome.err
    start, trained, kept = (routers(outcome) for outcome in (untrained, routed, both))
    assert all(not value.equal(start[name]) for name, value in trained.items())
    assert all(value.equal(trained[name]) for name, value in kept.items())
    results = both.results
    assert results["sparsity"] == results["sparsity_before"] == pytest.approx(0.5, abs=1e-6)
    assert results["soft"] == results["hard_before"]  # the gates scale in both
    assert results["hard"] is not None
    assert results["flops_per_token"] == flops_per_token(
        from_pretrained(both.run / "model"), results["sparsity_per_layer"]
    )


@pytest.mark.parametrize("name", [*GATES, "coactivation"])
def test_a_killed_fit_goes_on_as_if_nothing_had_been(name, fit, break_at, tiny, lightning, tmp_path):
    lte = GATES.get(name, {"expert_size": 8, "grouping": "coactivation"})
    whole = fit(lte, (2, 1), name="whole")
    break_at(8 + 3, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(lte, (2, 1), name="killed")
    break_at(-1, RuntimeError())
    (last,) = (tmp_path / "killed").glob("runs/*/*/checkpoints/last.ckpt")
    resumed = fit(lte, (2, 1), "--ckpt_path", last, name="killed")
    assert resumed.code == 0, resumed.err
    assert figures(resumed) == figures(whole)
    mine, others = (load_file(one.run / "model" / "model.safetensors") for one in (resumed, whole))
    assert all(value.equal(others[key]) for key, value in mine.items())


@pytest.mark.parametrize("lte", GATES.values(), ids=GATES)
def test_the_balance_loss_counts(lte, fit):
    without, strong = (
        fit(lte, (1, 0), name=str(weight), **{"model.init_args.balance_weight": weight}) for weight in (0.0, 1000.0)
    )
    assert strong.code == 0, strong.err
    assert any(not value.equal(routers(strong)[name]) for name, value in routers(without).items())


def test_neurons_are_grouped_by_what_they_do_on_training_rows(fit):
    by_weights, by_activations = (
        fit({"expert_size": 8, "grouping": grouping}, (1, 0), name=grouping) for grouping in ("kmeans", "coactivation")
    )
    assert by_activations.code == 0, by_activations.err
    grouping = by_activations.results["grouping"]
    assert grouping["inertia"] < grouping["random_inertia"]
    assert grouping != by_weights.results["grouping"]
    again = from_pretrained(by_activations.run / "model")
    assert again.lte_config.grouping == "coactivation"


@pytest.mark.parametrize("lte", [{"expert_size": 8}, *GATES.values()], ids=["router", *GATES])
def test_routers_that_are_not_frozen_learn_in_the_expert_stage(lte, fit, monkeypatch):
    seen, before_step = [], Classification.on_before_optimizer_step

    def see(self, optimizer):
        before_step(self, optimizer)
        if self.stage == "expert":
            seen.append(tuple(group["name"] for group in optimizer.param_groups))

    monkeypatch.setattr(Classification, "on_before_optimizer_step", see)
    routed = fit(lte, (1, 0), name="routed")
    thawed = fit(lte, (1, 1), name="thawed", **{"model.init_args.freeze_routers": False})
    assert thawed.code == 0, thawed.err
    assert set(seen) == {("model", "routers")}
    assert all(not value.equal(routers(routed)[name]) for name, value in routers(thawed).items())


def test_routers_that_do_not_learn_with_the_task_stay_frozen(fit):
    lte = {"expert_size": 8, "selector": "moefication", "target_sparsity": 0.5}
    refused = fit(lte, (1, 1), **{"model.init_args.freeze_routers": False})
    assert refused.code == 1
    assert "freeze_routers is false, but selector 'moefication' does not learn with the task" in refused.err

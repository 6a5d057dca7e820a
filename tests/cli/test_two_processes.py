"""Two processes do what one does.

They begin with everything imported, each told its place as torchrun tells it. A tutorial's test starts them as a user
would: a command whose strategy starts the other.
"""

import pytest
import torch

DDP = {"trainer.strategy": "ddp"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (3, 2)])
def test_two_processes_equal_one(accumulate, steps, tiny, calm, lightning, processes, tmp_path):
    """Each process takes every other batch, so two of them are one that accumulates two batches to a step.

    Batches differ in length. With three of them to a step the last step of an epoch has one of each process.

    SGD, because Adam would blow the rounding of gradients that are zero (an attention's key bias) up to whole steps.
    That routers agree proves that their gradients are reduced, although DDP wraps the model while they are frozen.
    """
    options = {"optimizer": "torch.optim.SGD", "learning_rate": 0.05, "router_learning_rate": 2.0}
    stages = {f"stages.{stage}.{key}": v for stage in ("dense", "router", "expert") for key, v in options.items()}
    config = tiny.config(epochs=(1, 2, 1), **stages)
    config["model"]["init_args"]["pretrained"] = str(calm)
    config["data"]["init_args"]["eval_batch_size"] = 4

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2 * accumulate)
    assert one.code == 0, one.err

    config["trainer"]["accumulate_grad_batches"] = accumulate
    two = processes(2, tmp_path / "two", config, "fit", **DDP)
    assert two.code == 0, two.err
    results = two.results
    assert results["versions"]["devices"] == 2

    (other,) = (tmp_path / "two").glob("runs/*/*/checkpoints/last.ckpt")
    mine, theirs = (torch.load(path, weights_only=True) for path in (one.run / "checkpoints" / "last.ckpt", other))
    assert mine["global_step"] == theirs["global_step"] == 4 * steps
    far = {
        name: float((value - theirs["state_dict"][name]).abs().max())
        for name, value in mine["state_dict"].items()
        if not torch.allclose(value, theirs["state_dict"][name], atol=1e-5)
    }
    assert far == {}
    biases = [value for name, value in mine["state_dict"].items() if name.endswith("selector.bias")]
    assert all((bias - 2.0).abs().max() > 0.01 for bias in biases)  # they began at 2
    for key in ("dense", "soft", "hard_before", "hard", "sparsity", "sparsity_per_layer"):
        assert results[key] == pytest.approx(one.results[key], abs=1e-6), key
    histograms = [found["lte"]["measured"]["hard"]["score_histogram"] for found in (mine, theirs)]
    assert sum(map(sum, histograms[0])) == sum(map(sum, histograms[1]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layers", "grouping"), [("equal", "kmeans"), ("free", "use")])
def test_a_target_is_held_over_two_processes_as_by_one(layers, grouping, tiny, calm, lightning, processes, tmp_path):
    """Quantiles of two processes are those of one, as are activations, the closed form and the calibration."""
    options = {"optimizer": "torch.optim.SGD", "learning_rate": 0.05, "router_learning_rate": 0.5}
    stages = {f"stages.{stage}.{key}": v for stage in ("dense", "router", "expert") for key, v in options.items()}
    lte = {"expert_size": 4, "target_sparsity": 0.7, "sparsity_per_layer": layers, "grouping": grouping}
    model = {"lte": lte, "efficiency_weight": None, "router_start": "closed-form", "detach_router": True}
    more = {f"model.init_args.{key}": value for key, value in model.items()}
    config = tiny.config(epochs=(1, 2, 1), **stages, **more)
    config["model"]["init_args"]["pretrained"] = str(calm)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2)
    assert one.code == 0, one.err
    two = processes(2, tmp_path / "two", config, "fit", **DDP)
    assert two.code == 0, two.err
    assert two.results["versions"]["devices"] == 2
    (other,) = (tmp_path / "two").glob("runs/*/*/checkpoints/last.ckpt")
    mine, theirs = (torch.load(path, weights_only=True) for path in (one.run / "checkpoints" / "last.ckpt", other))
    far = {
        name: float((value - theirs["state_dict"][name]).abs().max())
        for name, value in mine["state_dict"].items()
        if not torch.allclose(value, theirs["state_dict"][name], atol=1e-4)
    }
    assert far == {}
    for found in (one.results, two.results):
        assert found["sparsity"] == pytest.approx(0.7, abs=0.04)
    assert two.results["sparsity_per_layer"] == pytest.approx(one.results["sparsity_per_layer"], abs=1e-6)


@pytest.mark.timeout(300)
def test_two_processes_write_and_score_what_one_does(tiny_lm, lightning, processes, tmp_path):
    config = tiny_lm.config()
    (tmp_path / "one").mkdir()
    one = lightning(tmp_path / "one", config, "test")
    assert one.code == 0, one.err
    two = processes(2, tmp_path / "two", config, "test", **DDP)
    assert two.code == 0, two.err
    found = two.results
    assert found.keys() == one.results.keys()
    for key, value in one.results.items():
        assert found[key] == pytest.approx(value), key
    predictions = two.written.with_name("predictions.jsonl").read_text()
    assert predictions == one.written.with_name("predictions.jsonl").read_text()
    assert len(predictions.splitlines()) == 5

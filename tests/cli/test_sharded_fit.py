"""Processes that share out the weights (FSDP2) do what one does."""

import shutil
from pathlib import Path

import pytest
import torch

from lte_lightning.callbacks.sharded_checkpoint import read_folder

VIEWS = ("dense", "soft", "hard_before", "hard", "sparsity", "sparsity_per_layer")


def sgd(momentum=0.0, **more):
    """SGD, because Adam would blow the rounding of gradients that are zero up to whole steps."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"momentum": momentum}}
    options = {"optimizer": optimizer, "learning_rate": 0.05, "router_learning_rate": 2.0} | more
    return {f"stages.{stage}.{key}": v for stage in ("dense", "router", "expert") for key, v in options.items()}


def state(cwd: Path):
    """What the only run's last checkpoint holds."""
    (path,) = cwd.glob("runs/*/*/checkpoints/last.ckpt")
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def require_equal(one, other, atol=1e-5):
    """Weights and results of two fits."""
    assert one.code == other.code == 0, other.err
    mine, theirs = state(one.cwd), state(other.cwd)
    assert mine["global_step"] == theirs["global_step"]
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    far = {
        name: float((value - theirs["state_dict"][name]).abs().max())
        for name, value in mine["state_dict"].items()
        if not torch.allclose(value, theirs["state_dict"][name], atol=atol)
    }
    assert far == {}
    for key in VIEWS:
        assert other.results[key] == pytest.approx(one.results[key], abs=1e-6), key
    if atol <= 1e-5:
        mine, theirs = (found["lte"]["measured"]["hard"]["score_histogram"] for found in (mine, theirs))
        assert mine == theirs


@pytest.fixture
def make(tiny, calm, tmp_path):
    """Of thirteen rows to validate, two batches of at most six are in one process, and one is in the other."""
    rows = (tiny.task("sst2") / "validation.jsonl").read_text().splitlines()[:13]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "validation.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows" / "train.jsonl").hardlink_to(tiny.task("sst2") / "train.jsonl")
    data = {"data.init_args.source": str(tmp_path / "rows"), "data.init_args.eval_batch_size": 6}
    data |= {"model.init_args.pretrained": str(calm)}
    return lambda **more: tiny.config(epochs=(1, 2, 1), **sgd() | data | more)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_parts_equal_one_whole(accumulate, make, lightning, processes, tmp_path):
    """The second fit clips gradients by what all have, and hands the memory of regrouped neurons to the next stage."""
    hard = {"stages.keep_optimizer": True, "trainer.gradient_clip_val": 0.7} | sgd(
        momentum=0.5, router_learning_rate=0.5
    )
    config = make(**(hard if accumulate == 3 else {}))
    (tmp_path / "one").mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2 * accumulate)
    assert one.code == 0, one.err
    more = {"trainer.accumulate_grad_batches": accumulate}
    two = processes(2, tmp_path / "two", config, "fit", **more)
    require_equal(one, two)
    assert two.results["versions"]["devices"] == 2
    biases = [value for name, value in state(one.cwd)["state_dict"].items() if name.endswith("selector.bias")]
    assert all((bias - 2.0).abs().max() > 0.01 for bias in biases)  # they began at 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layers", "grouping"), [("equal", "use"), ("free", "coactivation")])
def test_a_target_is_held_over_parts(layers, grouping, make, lightning, processes, tmp_path):
    """Routers start in closed form, and their biases are moved by what all have seen."""
    lte = {"expert_size": 4, "target_sparsity": 0.7, "sparsity_per_layer": layers, "grouping": grouping}
    model = {"lte": lte, "efficiency_weight": None, "router_start": "closed-form", "detach_router": True}
    more = {f"model.init_args.{key}": value for key, value in model.items()}
    config = make(**more | sgd(router_learning_rate=0.5))
    (tmp_path / "one").mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2)
    two = processes(2, tmp_path / "two", config, "fit")
    require_equal(one, two, atol=1e-4)


@pytest.mark.timeout(300)
def test_one_fit_for_each_stage(make, processes, tmp_path):
    whole = processes(2, tmp_path / "whole", make(), "fit")
    assert whole.code == 0, whole.err
    stages, source = ("dense", "router", "expert"), ()
    for stage in stages:
        skipped = {f"stages.{other}.epochs": 0 for other in stages if other != stage}
        done = processes(2, tmp_path / stage, make(**skipped), "fit", *source)
        assert done.code == 0, done.err
        source = "--model.init_from", done.run / "model"
    mine, theirs = (state(fit.cwd)["state_dict"] for fit in (whole, done))
    assert all(value.equal(theirs[name]) for name, value in mine.items())
    assert done.results["hard"] == whole.results["hard"]


@pytest.mark.timeout(400)
def test_a_fit_goes_on_with_other_processes(make, processes, lightning, tmp_path):
    """Two processes begin it. One whole, or one of FSDP2, ends it, and two that go on with what one has begun."""
    config = make(**sgd(momentum=0.5))
    (tmp_path / "whole").mkdir()
    whole = lightning(tmp_path / "whole", config, "fit", "--trainer.accumulate_grad_batches", 2)
    begun = processes(2, tmp_path / "begun", config, "fit", "--trainer.max_epochs", 2)
    assert whole.code == begun.code == 0, whole.err + begun.err
    alone = ("fit", "--trainer.accumulate_grad_batches", 2)
    for name in ("one", "sharded", "two"):
        shutil.copytree(tmp_path / "begun", tmp_path / name)
    last = begun.run.relative_to(begun.cwd) / "checkpoints" / "last.ckpt"
    one = lightning(tmp_path / "one", config, *alone, "--ckpt_path", last, "--trainer.max_epochs", 3)
    assert one.code == 0, one.err
    assert (one.run / "checkpoints" / "last.ckpt").is_file()
    sharded = processes(1, tmp_path / "sharded", config, *alone, "--ckpt_path", last)
    require_equal(whole, sharded)
    shutil.rmtree(tmp_path / "two")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = processes(2, tmp_path / "two", config, "fit", "--ckpt_path", last)
    require_equal(whole, two)
    changed = lightning(tmp_path / "sharded", config, "fit", "--ckpt_path", last, "--model.separability_weight", 0.9)
    assert "separability_weight is 0.9, but" in changed.err  # the options of a folder's checkpoint are read as a file's
    tested = [
        processes(2, tmp_path / "sharded", config, "test", "--ckpt_path", last),
        lightning(tmp_path / "whole", config, "test", "--model.init_from", whole.run / "model"),
    ]
    assert [each.code for each in tested] == [0, 0], tested[0].err
    assert tested[0].results["accuracy"] == pytest.approx(tested[1].results["accuracy"])
    assert tested[0].results["sparsity"] == pytest.approx(tested[1].results["sparsity"])


@pytest.mark.timeout(400)
def test_a_decoder_learns_from_its_dense_self_and_writes(tiny_lm, processes, lightning, tmp_path):
    """The teacher is shared out, too; processes write different numbers of tokens, in step."""
    distilled = {"model.init_args.distillation": 0.5, "model.init_args.gradient_checkpointing": True}
    config = tiny_lm.config(**sgd(router_learning_rate=0.5), **distilled)
    (tmp_path / "one").mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2)
    two = processes(2, tmp_path / "two", config, "fit", **{"model.init_args.samples": 1})
    assert one.code == two.code == 0, one.err + two.err
    mine, theirs = (state(each.cwd)["state_dict"] for each in (one, two))
    assert [name for name, value in mine.items() if not torch.allclose(value, theirs[name], atol=1e-4)] == []
    tested = [
        processes(2, tmp_path / "two", config, "test", "--model.init_from", two.run / "model"),
        lightning(tmp_path / "one", config, "test", "--model.init_from", two.run / "model"),
    ]
    assert [each.code for each in tested] == [0, 0], tested[0].err
    for key in ("rouge_l", "examples", "perplexity", "sparsity"):
        assert tested[0].results[key] == pytest.approx(tested[1].results[key], abs=1e-6)


def test_lightnings_own_strategy_is_refused_by_name(make, processes, tmp_path):
    name = "lightning.pytorch.strategies.ModelParallelStrategy"
    fit = processes(1, tmp_path / "one", make(), "fit", **{"trainer.strategy": {"class_path": name}})
    assert fit.code == 1
    assert "stages cannot be switched under ModelParallelStrategy: use trainer.strategy ddp" in fit.err
    assert "or fsdp2, where each holds a part" in fit.err
    assert "Traceback" not in fit.err

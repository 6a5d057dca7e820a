"""A fit on a stream of rows: its length, what a resumed one goes on with, and that processes share it."""

import pytest
import torch

from lte_lightning.data import GenerationData

STREAM = {
    "data.init_args.streaming": True,
    "data.init_args.shuffle_buffer": 24,
    "stages.dense.steps": 7,
    "stages.router.steps": 6,
    "stages.expert.steps": 4,
    "trainer.limit_train_batches": 3,
}


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(mine, theirs):
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    other = theirs["state_dict"]
    assert [name for name, value in mine["state_dict"].items() if not torch.equal(value, other[name])] == []


def figures(outcome):
    return {key: value for key, value in outcome.results.items() if key not in ("seconds_per_stage", "floor")}


@pytest.fixture(scope="module")
def whole(tiny_lm, lightning, tmp_path_factory):
    outcome = lightning(tmp_path_factory.mktemp("whole"), tiny_lm.config(**STREAM), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


def test_steps_and_passes(whole):
    last = weights(whole.run)
    assert last["global_step"] == 7 + 6 + 4
    assert last["epoch"] == 3 + 2 + 2 - 1
    # the stages' 17 batches of 8 rows are 6 buffers of 24; the set has 60 rows
    marks = {0: [0, 0], 1: [0, 24], 2: [0, 48], 3: [1, 12], 4: [1, 36], 5: [2, 0]}
    assert last["GenerationData"]["stream"]["marks"] == marks


def test_a_test_reads_no_training_rows(whole, tiny_lm, lightning, tmp_path):
    source = tmp_path / "e2e"
    source.mkdir()
    (source / "validation.jsonl").write_text((tiny_lm.task("e2e") / "validation.jsonl").read_text())
    config = tiny_lm.config(**{**STREAM, "data.init_args.source": str(source)})
    tested = lightning(tmp_path, config, "test", "--model.init_from", whole.run / "model")
    assert tested.code == 0, tested.err
    assert tested.results["perplexity"] == pytest.approx(whole.results["hard"], rel=1e-5)


@pytest.mark.parametrize(("step", "row"), [(4, 0), (8, 48), (12, 12), (16, 0)])
def test_killed_in_the_middle_of_a_stage(step, row, whole, tiny_lm, lightning, tmp_path, break_at, monkeypatch):
    """The pass that was cut short is done again, from the batch it began with.

    Rows before that batch's buffer are not tokenised again, or but for one buffer if this one was never reached.
    """
    break_at(step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, tiny_lm.config(**STREAM), "fit")
    break_at(-1, RuntimeError())
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    read, chunks = [], GenerationData.chunks

    def watched(self, row):
        read.append(row)
        return chunks(self, row)

    monkeypatch.setattr(GenerationData, "chunks", watched)
    resumed = lightning(tmp_path, tiny_lm.config(**STREAM), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert_same(weights(resumed.run), weights(whole.run))
    assert figures(resumed) == figures(whole)
    assert read[0] == 0  # to see what is wrong with the first rows
    assert read[1] == row


@pytest.mark.timeout(300)
def test_two_processes_equal_one(tiny_lm, lightning, processes, tmp_path):
    options = {"optimizer": "torch.optim.SGD", "learning_rate": 0.05, "router_learning_rate": 2.0}
    sgd = {f"stages.{stage}.{key}": v for stage in ("dense", "router", "expert") for key, v in options.items()}
    config = tiny_lm.config(**{**STREAM, **sgd, "data.init_args.batch_size": 4, "trainer.limit_train_batches": 6})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = lightning(tmp_path / "one", config, "fit", "--trainer.accumulate_grad_batches", 2)
    assert one.code == 0, one.err
    config["trainer"]["limit_train_batches"] = 3
    two = processes(2, tmp_path / "two", config, "fit", **{"trainer.strategy": "ddp"})
    assert two.code == 0, two.err
    mine, theirs = weights(one.run), weights(two.run)
    assert mine["global_step"] == theirs["global_step"] == 17
    far = {
        name: float((value - theirs["state_dict"][name]).abs().max())
        for name, value in mine["state_dict"].items()
        if not torch.allclose(value, theirs["state_dict"][name], atol=1e-4)
    }
    assert far == {}
    assert two.results["hard"] == pytest.approx(one.results["hard"], rel=1e-4)


@pytest.mark.parametrize("data", ["InstructData", "LanguageModelData"])
def test_other_tasks(data, tiny_lm, lightning, tmp_path):
    outcome = lightning(tmp_path, tiny_lm.config(data, **{**STREAM, "trainer.enable_progress_bar": True}), "fit")
    assert outcome.code == 0, outcome.err
    assert outcome.results["hard"] > 1


def test_epochs_of_a_given_length(tiny_lm, lightning, tmp_path):
    options = {"data.init_args.streaming": True, "data.init_args.shuffle_buffer": 24, "trainer.limit_train_batches": 2}
    config = tiny_lm.config(**options)
    outcome = lightning(tmp_path, config, "fit")
    assert outcome.code == 0, outcome.err
    assert weights(outcome.run)["global_step"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the router stage is to last epochs, but a stream of rows never ends; give stages.router.steps"),
        ({"trainer.limit_train_batches": 0.5}, "limit_train_batches is 0.5, a share of an endless stream"),
        ({"trainer.limit_train_batches": 0}, "limit_train_batches 0 leaves none"),
        ({"data.init_args.holdout": 0.1}, "holdout is 0.1, but a stream has no known number of rows"),
    ],
)
def test_refused(options, message, tiny_lm, lightning, tmp_path):
    config = tiny_lm.config(**{"data.init_args.streaming": True, "stages.dense.steps": 3, **options})
    outcome = lightning(tmp_path, config, "fit")
    assert outcome.code == 1
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err

"""A fit that was cut short and resumed, or cut in three, ends in the same weights as one that ran through."""

import json
import shutil

import pytest
import torch

from lte_lightning.data.text import BucketBatchSampler

EPOCHS = (2, 2, 2)
# Of eight batches a pass: the second stage does the other five of the first pass, the third goes on in the second pass.
STEPS = {"stages.dense.steps": 3, "stages.router.steps": 7, "stages.expert.steps": 4}


def figures(outcome):
    return {key: value for key, value in outcome.results.items() if key not in ("seconds_per_stage", "floor")}


def weights(outcome):
    return torch.load(outcome.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def whole(tiny, lightning, tmp_path_factory):
    """The uninterrupted fit; the model's dropout is 0.1."""
    outcome = lightning(tmp_path_factory.mktemp("whole"), tiny.config(epochs=EPOCHS), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize("epoch", range(1, 6))
def test_killed_in_the_middle_of_the_epoch_after(epoch, whole, tiny, lightning, tmp_path, break_at):
    break_at(8 * epoch + 3, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit")
    break_at(-1, RuntimeError())
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    resumed = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert_same(weights(resumed), weights(whole))
    assert figures(resumed) == figures(whole)


@pytest.fixture(scope="module")
def in_steps(tiny, lightning, tmp_path_factory):
    """The uninterrupted fit of stages that are no whole passes, and the rows of its batches."""
    drawn, rows = [], BucketBatchSampler.__iter__

    def watched(self):
        for batch in rows(self):
            if self.shuffle:
                drawn.append(batch)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BucketBatchSampler, "__iter__", watched)
        outcome = lightning(tmp_path_factory.mktemp("steps"), tiny.config(**STEPS), "fit")
    assert outcome.code == 0, outcome.err
    return outcome, drawn


def test_stages_in_steps_go_on_in_the_pass(in_steps):
    _, drawn = in_steps
    assert len(drawn) == 3 + 5 + 2 + 4
    first, second = ([row for batch in part for row in batch] for part in (drawn[:8], drawn[8:]))
    assert sorted(first) == list(range(64))
    assert len(second) == len(set(second)) == 48
    assert first[:48] != second


@pytest.mark.parametrize("step", [4, 9, 12])
def test_killed_in_a_stage_that_goes_on_in_a_pass(step, in_steps, tiny, lightning, tmp_path, break_at):
    break_at(step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, tiny.config(**STEPS), "fit")
    break_at(-1, RuntimeError())
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    resumed = lightning(tmp_path, tiny.config(**STEPS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert_same(weights(resumed), weights(in_steps[0]))
    assert figures(resumed) == figures(in_steps[0])


@pytest.mark.parametrize("older", [False, True])
def test_a_checkpoint_of_other_epochs_is_refused(older, tiny, lightning, tmp_path):
    stopped = lightning(tmp_path, tiny.config(**STEPS, **{"trainer.max_epochs": 2}), "fit")
    last = stopped.run / "checkpoints" / "last.ckpt"
    options = STEPS
    if older:  # epochs were cut otherwise
        content = torch.load(last, weights_only=True)
        (schedule,) = (state for name, state in content["callbacks"].items() if name.startswith("StageSchedule"))
        del schedule["done"]
        torch.save(content, last)
    else:
        options = STEPS | {"stages.dense.steps": 4}
    before = last.read_bytes()
    resumed = lightning(tmp_path, tiny.config(**options), "fit", "--ckpt_path", last)
    assert resumed.code == 1
    assert "was written by a fit of other stages, batches or data, or by an earlier version" in resumed.err
    assert "Traceback" not in resumed.err
    assert last.read_bytes() == before


def test_later_stages_may_change(in_steps, tiny, lightning, tmp_path):
    options = STEPS | {"stages.expert.steps": 20}
    stopped = lightning(tmp_path, tiny.config(**options, **{"trainer.max_epochs": 2}), "fit")
    last = stopped.run / "checkpoints" / "last.ckpt"
    resumed = lightning(tmp_path, tiny.config(**STEPS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert_same(weights(resumed), weights(in_steps[0]))


def test_stopped_at_the_end_of_a_stage(whole, tiny, lightning, tmp_path):
    stopped = lightning(tmp_path, tiny.config(epochs=EPOCHS, **{"trainer.max_epochs": 2}), "fit")
    last = stopped.run / "checkpoints" / "last.ckpt"
    resumed = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert resumed.run == stopped.run
    assert_same(weights(resumed), weights(whole))
    assert figures(resumed) == figures(whole)


@pytest.mark.parametrize("after", [5, 6])
def test_resumed_where_its_folder_was_moved(after, whole, tiny, lightning, tmp_path):
    """In the expert stage, and finished: the best checkpoint moved along."""
    old = tmp_path / "old"
    old.mkdir()
    stopped = lightning(old, tiny.config(epochs=EPOCHS, **{"trainer.max_epochs": after}), "fit")
    moved = tmp_path / "runs" / "lte" / stopped.run.name
    shutil.copytree(stopped.run, moved)
    shutil.rmtree(old)
    last = moved / "checkpoints" / "last.ckpt"
    resumed = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert resumed.run == moved
    assert not old.exists()
    assert_same(weights(resumed), weights(whole))
    assert figures(resumed) == figures(whole)


def test_stopped_in_the_middle_of_an_epoch(whole, tiny, lightning, tmp_path):
    """By a limit of Lightning's: the epoch that it cut short is done again."""
    stopped = lightning(tmp_path, tiny.config(epochs=EPOCHS, **{"trainer.max_steps": 8 * 2 + 3}), "fit")
    assert stopped.code == 0, stopped.err
    last = stopped.run / "checkpoints" / "last.ckpt"
    resumed = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    assert_same(weights(resumed), weights(whole))
    assert figures(resumed) == figures(whole)


def test_one_fit_per_stage(whole, tiny, lightning, tmp_path):
    source, outcomes = (), []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        epochs = tuple(count if stage == i else 0 for stage, count in enumerate(EPOCHS))
        outcomes.append(lightning(tmp_path / str(i), tiny.config(epochs=epochs), "fit", *source))
        assert outcomes[-1].code == 0, outcomes[-1].err
        source = ("--model.init_from", outcomes[-1].run / "model")
    assert_same(weights(outcomes[-1]), weights(whole))
    chosen = {"options": None}  # of one stage, and of the start's
    assert figures(outcomes[-1]) | chosen == figures(whole) | chosen
    assert outcomes[-1].results["options"]["start.stages.router.epochs"] == EPOCHS[1]
    assert outcomes[0].results["dense"] == whole.results["dense"]
    assert outcomes[1].results["hard_before"] == whole.results["hard_before"]


def test_weights_move_in_every_stage(whole, tiny, lightning, tmp_path):
    """The comparisons above would hold for fits that do nothing."""
    other = lightning(tmp_path, tiny.config(epochs=EPOCHS, seed_everything=2), "fit")
    mine, theirs = weights(whole), weights(other)
    assert [name for name in mine if name.endswith("weight") and torch.equal(mine[name], theirs[name])] == []


def test_a_run_of_another_version_is_not_resumed(whole, tiny, lightning, tmp_path):
    run = tmp_path / "runs" / "lte" / whole.run.name
    shutil.copytree(whole.run, run)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"layout": 7}))
    before = sorted(run.parents[1].rglob("*"))
    refused = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit", "--ckpt_path", run / "checkpoints" / "last.ckpt")
    assert refused.code == 1
    assert f"run folder {run} has layout 7, this lte-lightning reads 1" in refused.err
    assert sorted(run.parents[1].rglob("*")) == before

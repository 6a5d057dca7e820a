"""Which epochs the stages make, and which part of which pass over the data each of them is."""

import pytest

from lte_lightning.callbacks import StagePlan
from lte_lightning.callbacks.plan import lay_out
from lte_lightning.errors import UserError

OFF = StagePlan(epochs=0)


def found(dense=OFF, router=OFF, expert=OFF, per_pass=8, accumulate=1, goes_on=True, imitating=False):
    """Of each epoch: stage and number, batches, the stage and number that order the pass, the first batch in it."""
    epochs = lay_out({"dense": dense, "router": router, "expert": expert}, per_pass, accumulate, goes_on, imitating)
    names = {epoch.key: f"{epoch.stage} {epoch.number}" for epoch in epochs}
    return [(names[e.key], e.batches, names[e.order], e.start) for e in epochs]


def test_whole_passes_have_orders_of_their_own():
    stages = found(StagePlan(epochs=1), StagePlan(epochs=2), StagePlan(steps=8))
    assert stages == [(name, 8, name, 0) for name in ("dense 0", "router 0", "router 1", "expert 0")]


def test_steps_go_on_in_the_pass():
    assert found(StagePlan(steps=3), StagePlan(steps=14), StagePlan(steps=4)) == [
        ("dense 0", 3, "dense 0", 0),
        ("router 0", 5, "dense 0", 3),
        ("router 1", 8, "router 1", 0),
        ("router 2", 1, "router 2", 0),
        ("expert 0", 4, "router 2", 1),
    ]
    assert found(StagePlan(steps=3), OFF, StagePlan(steps=4))[1] == ("expert 0", 4, "dense 0", 3)


def test_epochs_begin_with_a_new_pass():
    assert found(StagePlan(steps=3), StagePlan(epochs=1), StagePlan(steps=4)) == [
        ("dense 0", 3, "dense 0", 0),
        ("router 0", 8, "router 0", 0),
        ("expert 0", 4, "expert 0", 0),
    ]


@pytest.mark.parametrize("router", [StagePlan(steps=9), StagePlan(epochs=2)])
def test_what_only_predictors_have_seen_is_new_to_the_model(router):
    dense, *_, expert = found(StagePlan(steps=3), router, StagePlan(steps=2), imitating=True)
    assert dense == ("dense 0", 3, "dense 0", 0)
    assert expert == ("expert 0", 2, "dense 0", 3)


def test_stages_of_a_stream_read_on():
    """Whose passes are no more than when it is validated: epochs are whole, and nothing is left out."""
    plans = {"dense": StagePlan(steps=7), "router": StagePlan(epochs=1), "expert": StagePlan(steps=4)}
    for imitating, router in ((False, 3), (True, 0)):
        epochs = lay_out(plans, 3, 1, goes_on=False, imitating=imitating)
        assert [epoch.batches for epoch in epochs] == [3, 3, 1, 3, 3, 1]
        assert [epoch.seen for epoch in epochs] == [0, 3, 6, 7, 7 + router, 10 + router]


def test_a_stage_of_no_end():
    with pytest.raises(UserError, match="the expert stage is too long: it would have 100,000 epochs or more"):
        found(expert=StagePlan(epochs=10**9))


@pytest.mark.parametrize(("steps", "batches"), [(5, [8, 6]), (3, [8]), (1, [3]), (6, [8, 8])])
def test_steps_are_kept_when_accumulation_does_not_divide_the_pass(steps, batches):
    """A pass of 8 batches is 3 optimizer steps of 3 batches, the last of 2."""
    assert [epoch[1] for epoch in found(StagePlan(steps=steps), accumulate=3)] == batches


def test_accumulation_in_what_is_left_of_a_pass():
    stages = found(StagePlan(steps=1), StagePlan(steps=4), accumulate=3)
    assert [epoch[1] for epoch in stages] == [3, 5, 6]  # 1; 2 (3 + 2), 2 (3 + 3) steps

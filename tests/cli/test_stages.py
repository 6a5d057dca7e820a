"""When stages change, how each one optimises, and what is measured on the way."""

import json
from types import SimpleNamespace

import pytest
import torch

from lte_lightning.callbacks import StageSchedule
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.tasks import Classification


def routers_of(module):
    return [parameter.detach().clone() for parameter in selector_parameters(module.net)]


@pytest.fixture
def watch(tiny, lightning, tmp_path, monkeypatch):
    """Run a fit and return what was seen at each optimizer step, each validation, and the fit itself."""
    steps, validations = [], []
    before_step, after_validation = Classification.on_before_optimizer_step, Classification.on_validation_epoch_end

    def see_step(self, optimizer):
        before_step(self, optimizer)
        steps.append(
            SimpleNamespace(
                stage=self.stage,
                epoch=self.current_epoch,
                groups=[(group["name"], group["weight_decay"]) for group in optimizer.param_groups],
                rates=[group["lr"] for group in optimizer.param_groups],
                separability=self.separability_weight_now(),
                routers=routers_of(self),
                modes={ffn.mode for ffn in expert_ffns(self.net).values()},
                in_optimizer=sum(len(group["params"]) for group in optimizer.param_groups),
                trained=sum(parameter.requires_grad for parameter in self.net.parameters()),
            )
        )

    def see_validation(self):
        after_validation(self)
        validations.append((self.trainer.sanity_checking, self.stage, self.current_epoch))

    monkeypatch.setattr(Classification, "on_before_optimizer_step", see_step)
    monkeypatch.setattr(Classification, "on_validation_epoch_end", see_validation)

    def run(config, *args):
        outcome = lightning(tmp_path, config, "fit", *args)
        assert outcome.code == 0, outcome.err
        return SimpleNamespace(steps=steps, validations=validations, outcome=outcome)

    return run


def of(seen, stage):
    return [step for step in seen.steps if step.stage == stage]


def test_epochs_modes_groups_rates(watch, tiny):
    given = {"stages.dense.final": 0.2, "stages.router.warmup": 0.25, "stages.expert.schedule": "constant"}
    config = tiny.config(epochs=(1, 3, 2), **given)
    seen = watch(config)
    assert [step.stage for step in seen.steps] == 8 * ["dense"] + 24 * ["router"] + 16 * ["expert"]
    modes = {"dense": {"dense"}, "router": {"soft"}, "expert": {"hard"}}
    assert all(step.modes == modes[step.stage] for step in seen.steps)
    assert [v[1] for v in seen.validations if not v[0]] == ["dense", *3 * ["router"], *2 * ["expert"]]

    assert {tuple(step.groups) for step in of(seen, "dense")} == {(("model", 0.0),)}
    assert {tuple(step.groups) for step in of(seen, "router")} == {(("model", 0.0), ("routers", 0.1))}
    assert {tuple(step.groups) for step in of(seen, "expert")} == {(("model", 0.0),)}
    assert all(step.in_optimizer == step.trained for step in seen.steps)

    # 24 steps, 6 of them warm-up: from 0 linearly to the peak, from there linearly towards 0.
    factors = [i / 6 for i in range(6)] + [(24 - i) / 18 for i in range(6, 24)]
    assert [step.rates[0] for step in of(seen, "router")] == pytest.approx([5e-3 * f for f in factors])
    assert [step.rates[1] for step in of(seen, "router")] == pytest.approx([0.01 * f for f in factors])
    assert [step.rates[0] for step in of(seen, "dense")] == pytest.approx([5e-3 * (1 - 0.1 * i) for i in range(8)])
    assert [step.rates[0] for step in of(seen, "expert")] == pytest.approx([0.0, *15 * [5e-3]])  # warm-up 0.06

    # lambda: nothing in the first half of the router stage, then a ramp to 0.5.
    ramp = [0.5 * max(0.0, (i / 24 - 0.5) / 0.5) for i in range(24)]
    assert [step.separability for step in of(seen, "router")] == pytest.approx(ramp)

    for frozen in ("dense", "expert"):
        first, *others = (step.routers for step in of(seen, frozen))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    last_moved, in_expert = of(seen, "router")[0].routers, of(seen, "expert")[0].routers
    assert not any(torch.equal(a, b) for a, b in zip(last_moved, in_expert, strict=True))


def test_constant_lambda(watch, tiny):
    constant = {"model.init_args.separability_start": 0.0, "model.init_args.separability_end": 0.0}
    seen = watch(tiny.config(epochs=(0, 1, 0), **constant, **{"model.init_args.separability_weight": 0.2}))
    assert {step.separability for step in seen.steps} == {0.2}


@pytest.mark.parametrize(
    ("steps", "accumulate", "epochs"),
    [
        # Eight batches a pass: 5; the rest of 3, 8 and 1; the rest of 7, 8 and 1.
        ((5, 12, 16), 1, {"dense": [0], "router": [1, 2, 3], "expert": [4, 5, 6]}),
        ((3, 5, 4), 2, {"dense": [0], "router": [1, 2], "expert": [3]}),
    ],
)
def test_steps_instead_of_epochs(steps, accumulate, epochs, watch, tiny):
    lengths = dict(zip(("dense", "router", "expert"), steps, strict=True))
    options = {f"stages.{stage}.steps": count for stage, count in lengths.items()}
    seen = watch(tiny.config(**options, **{"trainer.accumulate_grad_batches": accumulate}))
    assert {stage: len(of(seen, stage)) for stage in lengths} == lengths
    assert {stage: sorted({step.epoch for step in of(seen, stage)}) for stage in lengths} == epochs
    for stage, count in lengths.items():
        assert of(seen, stage)[-1].rates[0] == pytest.approx(5e-3 / max(count - round(0.06 * count), 1))
    assert len([v for v in seen.validations if not v[0]]) == sum(len(found) for found in epochs.values())


def test_accumulated_gradients_with_a_rest(watch, tiny):
    seen = watch(tiny.config(epochs=(1, 2, 1), **{"trainer.accumulate_grad_batches": 3}))
    assert [len(of(seen, stage)) for stage in ("dense", "router", "expert")] == [3, 6, 3]
    assert of(seen, "router")[-1].rates[0] == pytest.approx(5e-3 / 6)


def test_dense_skipped_is_measured_before_the_first_step(watch, tiny):
    seen = watch(tiny.config(epochs=(0, 1, 1)))
    assert [step.stage for step in seen.steps] == 8 * ["router"] + 8 * ["expert"]
    assert seen.validations[0] == (True, "dense", 0)
    assert 0 <= seen.outcome.results["dense"] <= 1
    assert list(seen.outcome.results["seconds_per_stage"]) == ["grouping", "router", "expert"]


def test_without_adaptation_the_result_is_what_hard_before_was(watch, tiny):
    results = watch(tiny.config(epochs=(1, 1, 0))).outcome.results
    assert results["hard"] is None
    assert results["hard_before"] is not None
    assert results["sparsity"] is not None


def test_only_hard_epochs_compete_for_the_best_checkpoint(tiny, lightning, tmp_path, monkeypatch):
    """Soft epochs are made to look perfect, and the first hard one the best of the hard ones."""
    read = Classification.read_meters

    def fake(self, view):
        found = read(self, view)
        value = 1.0 if view != "hard" else {3: 0.6, 4: 0.5, 5: 0.4}[self.current_epoch]
        return found | {"accuracy": value}

    monkeypatch.setattr(Classification, "read_meters", fake)
    fit = lightning(tmp_path, tiny.config(epochs=(1, 2, 3)), "fit")
    best = torch.load(fit.run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (best["epoch"], fit.results["hard"], fit.results["dense"]) == (3, 0.6, 1.0)


def test_sparsity_is_that_of_a_trace_over_the_rows(fitted, parse, tmp_path):
    cli = parse("--config", fitted.cwd / "fit.yaml", "--model.init_args.init_from", fitted.run / "model")
    cli.model.configure_model()
    cli.datamodule.setup("validate")
    net = cli.model.net.eval()
    set_mode(net, "hard")
    counts, tokens = 0, 0
    for row in range(20):  # one at a time: no padding but to a multiple of eight
        batch = cli.datamodule.collate()([cli.datamodule._ready["validation"][0][row]])
        mask = batch["attention_mask"]
        batch = {key: value[:, : mask.sum()] for key, value in batch.items() if key != "labels"}
        with torch.no_grad(), RouterTrace(net) as trace:
            net(**batch)
        active_L, n = trace.active_counts()
        counts, tokens = counts + active_L, tokens + n
    sparsity = [1 - int(active) / (tokens * 8) for active in counts]
    assert fitted.results["sparsity_per_layer"] == pytest.approx(sparsity, abs=1e-3)


def test_the_dial_is_monotone(tiny, lightning, tmp_path):
    found = []
    for eta in (0.0, 1.0, 5.0):
        folder = tmp_path / str(eta)
        folder.mkdir()
        config = tiny.config(epochs=(1, 3, 0), **{"model.init_args.efficiency_weight": eta})
        fit = lightning(folder, config, "fit")
        found.append(fit.results["sparsity"])
    assert found[0] < 0.2
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.8


def test_golden(tiny, lightning, tmp_path, golden, monkeypatch):
    losses = {}
    step = Classification.training_step

    def see(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.setdefault(self.stage, []).append(loss.item())
        return loss

    monkeypatch.setattr(Classification, "training_step", see)
    fit = lightning(tmp_path, tiny.config(epochs=(1, 2, 1)), "fit")
    about = {"sparsity_per_layer": fit.results["sparsity_per_layer"]}
    # Rounding differs between machines and grows with the steps.
    golden("tiny_fit", {"losses": losses, **about}, rtol=1e-2, atol=1e-2)


def test_schedule_needs_something_to_do():
    assert StageSchedule().stages == ["dense", "router", "expert"]
    assert json.dumps(StageSchedule().state_dict())  # plain types only, or a checkpoint could not be read

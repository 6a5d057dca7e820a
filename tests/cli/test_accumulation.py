"""An optimizer step of several batches learns what one of a single large batch does, though they differ in length."""

import shutil
from itertools import islice

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from lte_lightning.data.base import TextData
from lte_lightning.tasks.base import LteModule

SGD = {"optimizer": "torch.optim.SGD", "learning_rate": 0.05, "router_learning_rate": 0.5, "warmup": 0.0}
STAGES = {f"stages.{stage}.{key}": value for stage in ("dense", "router", "expert") for key, value in SGD.items()}


@pytest.fixture
def calm(tmp_path):
    """`calm(folder)`: the model without dropout."""

    def copy(folder):
        there = shutil.copytree(folder, tmp_path / f"calm-{folder.name}")
        config = AutoConfig.from_pretrained(there)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        config.save_pretrained(there)
        return str(there)

    return copy


@pytest.fixture
def gradients(lightning, tmp_path, monkeypatch):
    """`gradients(config, batch, accumulate)` fits on rows sorted by length: the gradients of each optimizer step."""

    def run(config, batch, accumulate, sampler=BatchSampler):
        found = []

        def loader(self):
            rows = self._ready["train"][0]
            order = sorted(range(len(rows)), key=rows["length"][:].__getitem__)
            return DataLoader(rows, batch_sampler=sampler(order, batch, False), collate_fn=self.collate())

        def watch(self, optimizer):
            grads = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
            found.append((self.stage, grads))

        monkeypatch.setattr(TextData, "train_dataloader", loader)
        monkeypatch.setattr(LteModule, "on_before_optimizer_step", watch)
        folder = tmp_path / f"{batch}-{accumulate}"
        folder.mkdir()
        fit = lightning(folder, config, "fit", "--trainer.accumulate_grad_batches", accumulate)
        assert fit.code == 0, fit.err
        return found

    return run


class Sorted(BatchSampler):
    """Goes on within a pass, as the package's own sampler does."""

    first = 0

    def begin(self, epoch, batch):
        self.first = batch

    def __iter__(self):
        yield from islice(super().__iter__(), self.first, None)


def assert_equal(mine, theirs, steps):
    assert [stage for stage, _ in mine] == [stage for stage, _ in theirs] == steps
    far = {
        (i, name): float((grad - theirs[i][1][name]).norm() / theirs[i][1][name].norm())
        for i, (_, grads) in enumerate(mine)
        for name, grad in grads.items()
        if not torch.allclose(grad, theirs[i][1][name], rtol=1e-3, atol=1e-5)
    }
    assert far == {}
    assert any("selector" in name for _, grads in mine for name in grads)


def test_rows_of_an_encoder(tiny, calm, gradients):
    """The last step of an epoch has two batches, the others three."""
    config = tiny.config(**STAGES, **{"model.init_args.pretrained": calm(tiny.model)})
    config["model"]["init_args"] |= {"separability_start": 0.0, "separability_end": 0.0}
    mine, theirs = gradients(config, 8, 3), gradients(config, 24, 1)
    assert_equal(mine, theirs, ["dense"] * 3 + ["router"] * 3 + ["expert"] * 3)


def test_a_stage_that_ends_within_a_pass(tiny, calm, gradients):
    """Its last step is whole; the next stage begins with what is left of the pass, which is a short step.

    With a teacher, and gradients that are clipped.
    """
    steps = {f"stages.{stage}.steps": 2 for stage in ("dense", "router", "expert")}
    more = {"trainer.gradient_clip_val": 0.05, "model.init_args.distillation": 0.5}
    config = tiny.config(**STAGES, **steps, **more, **{"model.init_args.pretrained": calm(tiny.model)})
    mine, theirs = gradients(config, 8, 3, Sorted), gradients(config, 24, 1, Sorted)
    assert_equal(mine, theirs, ["dense"] * 2 + ["router"] * 2 + ["expert"] * 2)


def test_resumed_between_stages(tiny, lightning, tmp_path):
    steps = {f"stages.{stage}.steps": 2 for stage in ("dense", "router", "expert")}
    config = tiny.config(**steps, **{"trainer.accumulate_grad_batches": 3})
    weights = []
    for limits in ((), (1, 2, 3)):
        folder = tmp_path / str(len(limits))
        folder.mkdir()
        words = []
        for limit in (*limits, -1):
            fit = lightning(folder, config, "fit", "--trainer.max_epochs", limit, *words)
            assert fit.code == 0, fit.err
            words = ["--ckpt_path", fit.run / "checkpoints" / "last.ckpt"]
        weights.append(torch.load(words[1], weights_only=True)["state_dict"])
    assert [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])] == []


def test_tokens_of_a_decoder_whose_routers_are_trained_on(tiny_lm, calm, gradients):
    config = tiny_lm.config(epochs=(0, 1, 1), **STAGES)
    # a teacher of every token, as well
    more = {"pretrained": calm(tiny_lm.model), "freeze_routers": False, "distillation": 0.5}
    config["model"]["init_args"] |= more
    mine, theirs = gradients(config, 7, 4), gradients(config, 28, 1)
    assert_equal(mine, theirs, ["router"] * 3 + ["expert"] * 3)


def test_an_encoder_decoder_counts_each_stack(tiny_lm, calm, gradients, tmp_path):
    folder = shutil.copytree(tiny_lm.model, tmp_path / "t5")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes, **tokens)).save_pretrained(folder)
    config = tiny_lm.config(epochs=(0, 1, 1), **STAGES)
    config["model"]["init_args"] |= {"pretrained": calm(folder), "separability_start": 0.0, "separability_end": 0.0}
    mine, theirs = gradients(config, 10, 2), gradients(config, 20, 1)
    assert_equal(mine, theirs, ["router"] * 3 + ["expert"] * 3)


def test_a_stream_is_read_ahead_by_whole_steps(tiny_lm, calm, lightning, tmp_path):
    """A stage may begin in the middle of a stream: what was read ahead is neither lost nor seen twice."""
    config = tiny_lm.config(**STAGES, **{"model.init_args.pretrained": calm(tiny_lm.model)})
    config["data"]["init_args"] |= {"streaming": True, "shuffle_buffer": 8}
    found = []
    for stage in config["stages"].values():
        stage["steps"] = 3
    for batch, accumulate in ((4, 2), (8, 1)):
        config["data"]["init_args"]["batch_size"] = batch
        folder = tmp_path / str(batch)
        folder.mkdir()
        fit = lightning(folder, config, "fit", "--trainer.accumulate_grad_batches", accumulate)
        assert fit.code == 0, fit.err
        last = torch.load(fit.run / "checkpoints" / "last.ckpt", weights_only=True)
        found.append(last["state_dict"])
    mine, theirs = found
    assert [name for name, value in mine.items() if not torch.allclose(value, theirs[name], atol=1e-4)] == []


def test_a_schedule_of_accumulation_is_refused(tiny, lightning, tmp_path):
    scheduler = {
        "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
        "init_args": {"scheduling": {0: 2}},
    }
    fit = lightning(tmp_path, tiny.config(**{"trainer.callbacks": [scheduler]}), "fit")
    assert fit.code == 1
    assert "use trainer.accumulate_grad_batches, which holds for the whole fit" in fit.err

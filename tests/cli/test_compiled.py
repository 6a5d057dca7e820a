"""A training step of a compiled model learns what an eager one does, in all stages and over their switches."""

import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch._dynamo.utils import counters
from transformers import BertConfig

from lte_lightning import LteConfig
from lte_lightning.callbacks import StagePlan, StageSchedule
from lte_lightning.data import GlueData
from lte_lightning.errors import UserError
from lte_lightning.tasks import Classification

pytestmark = pytest.mark.timeout(600)


class Losses(Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append((module.stage, float(outputs["loss"])))


@pytest.fixture
def fit(tiny, tmp_path):
    """`fit(prepare, **how)` fits what `prepare(module)` returns, without dropout: the losses, and the module."""
    there = shutil.copytree(tiny.model, tmp_path / "calm")
    config = BertConfig.from_pretrained(there, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.save_pretrained(there)

    def run(prepare, target=None, **how):
        seed_everything(1)
        lte = LteConfig(8, target_sparsity=target)
        module = Classification(task="sst2", pretrained=str(there), lte=lte, **how)
        source = str(tiny.task("sst2"))
        data = GlueData(task="sst2", source=source, tokenizer=str(there), max_length=16, batch_size=32)
        plans = [StagePlan(epochs=1, learning_rate=5e-3) for _ in range(3)]
        losses = Losses()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=-1, callbacks=[StageSchedule(*plans, seed=1), losses],
            enable_model_summary=False, log_every_n_steps=1, **quiet,
        )  # fmt: skip
        trainer.fit(prepare(module), datamodule=data)
        return losses.found, module

    yield run
    # what was compiled belongs to Module._call_impl, which all modules share: at its limit torch would compile no other
    torch.compiler.reset()


def compiled(backend, module):
    module.configure_model()
    module.net.compile(backend=backend)
    return module


@pytest.mark.parametrize(("backend", "how"), [("aot_eager", {}), ("eager", {"target": 0.5, "freeze_routers": False})])
def test_losses_and_weights_are_those_of_an_eager_fit(backend, how, fit):
    theirs, eager = fit(lambda module: module, **how)
    torch.compiler.reset()
    counters.clear()
    mine, module = fit(partial(compiled, backend), **how)
    assert sum(counters["graph_break"].values()) == 0, counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 4  # training in three stages, and measuring
    assert [stage for stage, _ in mine] == [stage for stage, _ in theirs]
    assert {stage for stage, _ in mine} == {"dense", "router", "expert"}
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-3, abs=1e-4)
    state = eager.state_dict()
    assert module.state_dict().keys() == state.keys()
    far = [name for name, value in module.state_dict().items() if not torch.allclose(value, state[name], atol=1e-3)]
    assert far == []
    for view in ("dense", "soft", "hard"):
        assert module.measured[view]["accuracy"] == pytest.approx(eager.measured[view]["accuracy"], abs=0.051)
    assert module.measured["hard"]["sparsity"] == pytest.approx(eager.measured["hard"]["sparsity"], abs=0.01)


def test_a_module_that_is_compiled_as_a_whole_is_refused(fit):
    with pytest.raises(
        UserError, match=r"compile the model alone, by module.configure_model\(\) and module.net.compile"
    ):
        fit(lambda module: torch.compile(module, backend="eager"))

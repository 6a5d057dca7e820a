"""A converted model in the hands of `transformers.Trainer`."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from lte_lightning import LteConfig, convert, from_pretrained, set_mode
from lte_lightning.core.model.convert import selector_parameters


@pytest.fixture
def rows(batch) -> Dataset:
    ids = batch["input_ids"].repeat(4, 1).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture
def make(build, tmp_path, rows):
    """`make(seed, **options)`: a trainer of six steps with a fresh model in soft mode, saving every second."""

    def make(seed: int = 0, **options: object) -> Trainer:
        model = convert(build("llama-biases-gqa-tied", "lm", 0.0), LteConfig(16, seed=seed), progress=False)
        set_mode(model, "soft")
        arguments = {
            "output_dir": str(tmp_path / "runs"),
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        data = {"train_dataset": rows, "eval_dataset": rows}
        return Trainer(model, TrainingArguments(**arguments | options), **data)

    return make


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_checkpoints(make, batch, tmp_path):
    trainer = make()
    first = [parameter.clone() for parameter in selector_parameters(trainer.model)]
    trainer.train()
    model = trainer.model
    assert not any(map(torch.equal, first, selector_parameters(model))), "no router was trained"
    trainer.save_model()
    for folder in (tmp_path / "runs" / "checkpoint-6", tmp_path / "runs"):
        set_mode(model, "soft")
        assert logits(from_pretrained(folder), batch).equal(logits(model, batch))
        plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        set_mode(model, "dense")
        assert logits(plain, batch).equal(logits(model, batch))
    # of another seed are neurons and routers, until the checkpoint's are loaded
    resumed = make(seed=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    mine, theirs = resumed.model.state_dict(), model.state_dict()
    assert [key for key in theirs if not mine[key].equal(theirs[key])] == []


def test_the_best_model_at_the_end(make, batch, tmp_path):
    # the best is the worst here, for that is not the last
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make(eval_strategy="steps", eval_steps=2, **best)
    trainer.train()
    best, last = trainer.state.best_model_checkpoint, tmp_path / "runs" / "checkpoint-6"
    assert best != str(last)
    assert logits(trainer.model, batch).equal(logits(from_pretrained(best), batch))
    assert not logits(trainer.model, batch).equal(logits(from_pretrained(last), batch))

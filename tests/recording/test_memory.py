from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from lte_lightning import LteConfig, convert
from lte_lightning.core.accounting.memory import training_memory
from lte_lightning.recording.memory import expected_memory


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(hidden_size=2048, intermediate_size=4096, num_hidden_layers=4, vocab_size=1024)
    with torch.device("meta"):
        return convert(LlamaForCausalLM(config), LteConfig(32, "contiguous"), progress=False)


def described(model, precision="bf16-mixed", optimizer=AdamW, devices=1, **data):
    optimizers = [optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1)]
    trainer = SimpleNamespace(
        precision=precision, datamodule=SimpleNamespace(**data), optimizers=optimizers, world_size=devices
    )
    return expected_memory(trainer, SimpleNamespace(net=model))


def test_the_batch_and_the_precision_count(model):
    line = described(model, "32-true", batch_size=4, max_length=512)
    memory = training_memory(model, 4 * 512, "32-true")
    assert line == f"{memory.describe()}; 32-true, at most 4 x 512 tokens"
    assert f"activations {memory.activations / 2**30:.2f})" in line
    assert memory.activations > 2**28


@pytest.mark.parametrize(
    ("optimizer", "name", "values"),
    [(AdamW, "AdamW", 2), (SGD, "SGD", 0), (partial(SGD, momentum=0.9), "SGD", 1), (Adagrad, "Adagrad", 1)],
)
def test_the_optimizer_counts_by_its_name_and_what_it_keeps(optimizer, name, values, model):
    line = described(model, "32-true", optimizer)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert f", {name} {4 * values * weights / 2**30:.2f}," in line


def test_gradient_checkpointing_is_seen(model):
    plain = described(model, batch_size=4, max_length=512)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    line = described(model, batch_size=4, max_length=512)
    assert ", gradient checkpointing, at most" in line
    assert float(line.split()[0]) < float(plain.split()[0])


def test_several_devices_keep_gradients_twice(model):
    one, two = (described(model, "32-true", devices=devices) for devices in (1, 2))
    gradients = sum(4 * parameter.numel() for parameter in model.parameters()) / 2**30
    assert f", for the other devices {gradients:.2f});" in two
    assert "other devices" not in one
    assert float(two.split()[0]) - float(one.split()[0]) == pytest.approx(gradients, abs=0.011)


def test_data_that_do_not_say_how_long_they_are(model):
    line = described(model, batch_size=4)
    assert "activations 0.00); bf16-mixed" in line
    assert "the length of a batch is unknown" in line


def test_a_precision_that_is_not_known(model):
    assert described(model, "transformer-engine") == "not known for precision transformer-engine"

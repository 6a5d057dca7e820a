"""What is timed: the calls of a latency measurement, their results instead of their times."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lte_lightning import LteConfig, convert, save_pretrained, set_mode
from lte_lightning.core.model import prepared as sparse
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.recording import latency
from lte_lightning.recording.latency import measure_latency

LENGTHS = (9, 6, 9, 12, 7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes)).eval()
    model = convert(model, LteConfig(expert_size=16), progress=False)
    with torch.no_grad():
        for parameter in selector_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    set_mode(model, "hard")
    return model


def collate(rows):
    length = max(len(row) for row in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
    return {"input_ids": padded, "attention_mask": (padded > 0).long(), "words": torch.ones(len(rows))}


@pytest.fixture
def trainer():
    """What the measurement asks of a trainer."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]
    data = SimpleNamespace(val_dataloader=lambda: [DataLoader(rows, batch_size=4, collate_fn=collate)])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(datamodule=data, strategy=strategy, precision="32-true")


def test_a_decoding_step_computes_what_the_whole_text_does(model, trainer):
    batches = latency.row_batches(trainer.datamodule.val_dataloader()[0], 2, torch.device("cpu"))
    assert [batch.keys() for batch in batches] == [{"input_ids", "attention_mask"}] * 2  # a fifth row has no neighbour
    with torch.inference_mode():
        steps = []
        assert latency.decode(model, batches, lambda calls: [steps.append(call().logits) or 1.0 for call in calls]) == [
            1
        ]
        expected = []
        for batch in batches:
            length = int(batch["attention_mask"].sum(1).min())
            logits_BTV = model(batch["input_ids"][:, :length]).logits
            expected += logits_BTV[:, length - length // 2 :].unbind(1)
    torch.testing.assert_close(torch.cat(steps, dim=1), torch.stack(expected, dim=1))


def test_the_dense_twin_is_plain_and_the_sparse_one_skips(model, trainer, tmp_path, monkeypatch):
    save_pretrained(model, tmp_path / "model")
    ran, backends, run_experts = [], {}, sparse.run_experts
    monkeypatch.setattr(sparse, "run_experts", lambda name, *rest: ran.append(name) or run_experts(name, *rest))

    def once(arms, rounds):
        found = {}
        for name, arm in arms.items():
            ran.clear()
            found[name] = arm()
            backends[name] = set(ran)
        return found

    monkeypatch.setattr(latency, "interleave", once)
    found = measure_latency(tmp_path / "model", trainer, 2, "reference")
    assert backends == {"dense": set(), "sparse": {"reference"}}
    assert found["speedup"] == found["dense_latency_ms"] / found["latency_ms"] > 0
    about = {"call": "decoding step", "rows": 2, "dtype": "float32", "device": "cpu"}
    assert found["latency_of"].items() >= about.items()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"), ("16-mixed", "float16"), ("32-true", "float32")],
)
def test_it_is_timed_in_the_type_of_the_precision(precision, dtype):
    assert str(latency.run_dtype(precision)) == f"torch.{dtype}"

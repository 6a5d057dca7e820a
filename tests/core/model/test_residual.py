"""Sums and LayerNorms of encoders: by our kernel where it fits, by torch's where it does not."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertOutput

import lte_lightning
from lte_lightning.core.model import residual
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, restore
from lte_lightning.core.model.quantize import quantize
from lte_lightning.core.model.residual import use_sum_norms

PER_LAYER = {"bert": 2, "roberta": 2, "electra": 2, "deberta-v2": 2, "mpnet": 1, "distilbert": 0, "modernbert": 0}


@pytest.fixture
def sparse(build):
    def sparse(family="bert", backend="auto", dtype=torch.bfloat16):
        model = convert(build(family, "classification", 0.0), LteConfig(16, "contiguous"), progress=False).to(dtype)
        set_backend(model, backend)
        return model.eval()

    return sparse


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the kernel."""
    kernel, calls = residual.run_sum_norm, []
    monkeypatch.setattr(residual, "run_sum_norm", lambda *given: calls.append(given) or kernel(*given))
    return calls


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("family", PER_LAYER)
def test_an_encoder_computes_the_same(family, sparse, batch, calls):
    model = sparse(family)
    names = [(name, type(module).__name__) for name, module in model.named_modules()]
    ours = logits(model, batch)
    assert len(calls) == PER_LAYER[family] * model.config.num_hidden_layers
    use_sum_norms(model, kernel=False)
    torchs = logits(model, batch)
    assert len(calls) == PER_LAYER[family] * model.config.num_hidden_layers
    assert [(name, type(module).__name__) for name, module in model.named_modules()] == names
    right = logits(copy.deepcopy(model).float(), batch)
    assert (ours - right).norm() < 1.5 * (torchs - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("family", [family for family, count in PER_LAYER.items() if count])
def test_the_modules_compute_what_the_kernel_computes(family, sparse):
    """A later transformers might add something to these classes, which the kernel would leave out."""
    model = sparse(family, dtype=torch.float32)
    closing = [module for module in model.modules() if isinstance(module, residual._SumNorm)]
    for module in closing:
        own = type(module).__mro__[2]
        hidden = torch.randn(2, 3, getattr(module.dense, "in_features", 32))
        x = torch.randn(2, 3, 32)
        assert torch.equal(own.forward(module, hidden, x), module(hidden, x))


def test_where_torchs_is_kept(sparse, batch, calls):
    logits(sparse(backend="dense-mask"), batch)
    logits(sparse(dtype=torch.float32), batch)
    model = sparse()
    model(**batch).logits.sum().backward()
    with torch.no_grad():
        model.train()(**batch)
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
    assert not calls


def test_what_was_added_to_the_modules_is_seen(sparse, batch, calls):
    model = sparse()
    outputs = [layer.output for layer in model.base_model.encoder.layer]
    logits(model, batch)
    every = len(calls)
    seen = []
    handle = outputs[0].LayerNorm.register_forward_hook(lambda *given: seen.append(given))
    outputs[1].dropout = nn.AlphaDropout(0.0)
    calls.clear()
    logits(model, batch)
    assert len(seen) == 1
    assert len(calls) == every - 2
    handle.remove()
    calls.clear()
    logits(model, batch)
    assert len(calls) == every - 1
    with nn.modules.module.register_module_forward_hook(lambda *given: None):
        calls.clear()
        logits(model, batch)
        assert not calls


def test_it_goes_with_the_backend_and_comes_back_with_folders_copies_and_pickles(sparse, batch, tmp_path, calls):
    model = sparse()
    expected, every = logits(model, batch), len(calls)
    lte_lightning.save_pretrained(model, tmp_path / "plain")
    quantised = quantize(sparse())
    lte_lightning.save_pretrained(quantised, tmp_path / "quantised")
    for other, right in (
        (copy.deepcopy(model), expected),
        (pickle.loads(pickle.dumps(model)), expected),
        (lte_lightning.from_pretrained(tmp_path / "plain"), expected),
        (lte_lightning.from_pretrained(tmp_path / "quantised"), logits(quantised, batch)),
    ):
        calls.clear()
        assert torch.equal(logits(other, batch), right)
        assert len(calls) == every
    calls.clear()
    set_backend(model, "dense-mask")
    logits(model, batch)
    plain = restore(sparse())
    logits(plain, batch)
    assert not calls
    assert not any(isinstance(module, residual._SumNorm) for module in plain.modules())


def test_compiled_it_is_one_graph(sparse, batch):
    model = sparse()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(model, batch), whole(**batch).logits.detach(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_whose_forward_somebody_replaced(when, sparse, batch, calls, monkeypatch):
    """As people patch a model: the function keeps its name and module."""
    own = BertOutput.forward

    @functools.wraps(own)
    def doubled(self, hidden, residual):
        return 2 * own(self, hidden, residual)

    plain = sparse()
    once = logits(plain, batch)
    if when == "before":
        monkeypatch.setattr(BertOutput, "forward", doubled)
    model = sparse()
    if when == "after":
        monkeypatch.setattr(BertOutput, "forward", doubled)
    calls.clear()
    patched = logits(model, batch)
    assert len(calls) == model.config.num_hidden_layers  # BertSelfOutput's
    use_sum_norms(model, kernel=False)
    assert (patched - logits(model, batch)).norm() < 0.02 * patched.norm()
    assert not patched.allclose(once, atol=1e-2)

"""Attention of encoders: by our kernel where it fits, by torch's where it does not."""

import copy
import json

import pytest
import torch

import lte_lightning
from lte_lightning.core.model import attention
from lte_lightning.core.model.attention import NAME
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, restore
from lte_lightning.core.model.quantize import quantize


@pytest.fixture
def sparse(build):
    def sparse(family="bert", head="classification", backend="auto", dtype=torch.bfloat16):
        model = convert(build(family, head, 0.0), LteConfig(16, "contiguous"), progress=False).to(dtype)
        set_backend(model, backend)
        return model

    return sparse


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the kernel."""
    kernel, calls = attention.run_attention, []
    monkeypatch.setattr(attention, "run_attention", lambda *given: calls.append(given) or kernel(*given))
    return calls


@torch.no_grad()
def logits(model, batch, implementation=NAME, **options):
    model.config._attn_implementation = implementation
    return model(**batch, **options).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_an_encoder_computes_the_same(family, sparse, batch, calls):
    model = sparse(family)
    assert model.config._attn_implementation == NAME
    exact = copy.deepcopy(model).float()
    for inputs in (batch, {"input_ids": batch["input_ids"]}):  # padded, and not
        calls.clear()
        ours = logits(model, inputs)
        assert len(calls) == model.config.num_hidden_layers
        right, torchs = logits(exact, inputs, "sdpa"), logits(model, inputs, "sdpa")
        assert len(calls) == model.config.num_hidden_layers
        assert (ours - right).norm() < 1.5 * (torchs - right).norm() + 1e-3 * right.norm()


def test_where_torchs_is_kept(sparse, batch, calls):
    assert sparse("llama", "lm").config._attn_implementation == "sdpa"
    assert sparse(backend="dense-mask").config._attn_implementation == "sdpa"
    shows = sparse(backend="dense-mask")
    shows.set_attn_implementation("eager")
    set_backend(shows, "auto")
    assert shows.config._attn_implementation == "eager"
    logits(sparse(dtype=torch.float32), batch)
    model = sparse()
    model(**batch).logits.sum().backward()
    assert not calls


def test_it_goes_with_the_backend(sparse, batch):
    model = sparse()
    set_backend(model, "dense-mask")
    assert model.config._attn_implementation == "sdpa"
    set_backend(model, "cpu")
    assert model.config._attn_implementation == NAME
    assert restore(model).config._attn_implementation == "sdpa"


def test_folders_do_not_name_it_and_use_it_again(sparse, batch, tmp_path, calls):
    for name, model in (("plain", sparse()), ("quantised", quantize(sparse()))):
        lte_lightning.save_pretrained(model, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert not any("attn_implementation" in key for key in config)
        loaded = lte_lightning.from_pretrained(tmp_path / name)
        assert loaded.config._attn_implementation == NAME
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        assert calls
        calls.clear()


def test_compiled_it_is_one_graph(sparse, batch):
    model = sparse()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(model, batch), whole(**batch).logits.detach(), atol=0.05, rtol=0.05)


def test_what_the_kernel_does_not_know_goes_to_torch(calls):
    module = torch.nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))

    def attend(mask=None, query=q, **options):
        out, _ = attention._attend(module, query, k, v, mask, **options)
        return out

    plain = attend()
    assert calls
    calls.clear()
    same = [
        attend(torch.zeros(1, 1, 5, 5).bfloat16()),
        attend(torch.ones(1, 2, 5, 5, dtype=torch.bool)),
        attend(query=q.clone().requires_grad_()),
        attend(position_bias=torch.zeros(1, 2, 5, 5).bfloat16()),
    ]
    for out in same:
        torch.testing.assert_close(out, plain, atol=0.02, rtol=0.02)
    assert not torch.allclose(attend(is_causal=True), plain)
    assert not calls

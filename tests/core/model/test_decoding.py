"""Fused decoding gives what the modules give, and leaves to them whatever it does not know."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import lte_lightning
from lte_lightning import LteConfig, RouterTrace, convert, fused_decoding, quantize, set_backend, set_mode
from lte_lightning.core.model import decoding, fusable
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.fusable import why_not_fused
from lte_lightning.core.model.quantize import QUANTIZATIONS
from lte_lightning.errors import UserError
from lte_lightning.kernels import dispatch

FUSABLE = ("llama", "llama-biases-gqa-tied", "qwen2", "qwen3")
CACHES = ("dynamic", "static")


@pytest.fixture
def routed(build, scatter):
    def routed(family="llama-biases-gqa-tied", kind="int8", dtype=torch.float32):
        model = scatter(convert(build(family, "lm", 0.0), LteConfig(16, "contiguous"), progress=False)).to(dtype)
        set_mode(model, "hard")
        set_backend(model, "auto")
        model.config.use_cache = model.generation_config.use_cache = True
        return quantize(model, kind) if kind else model

    return routed


@pytest.fixture
def steps(monkeypatch):
    """The positions that were computed fused."""
    seen, run = [], decoding.run_decoder

    def counted(decoder, table, x_ND, ids, rotary, places, position, mask_NT=None):
        seen.append(position)
        return run(decoder, table, x_ND, ids, rotary, places, position, mask_NT)

    monkeypatch.setattr(decoding, "run_decoder", counted)
    return seen


def texts(rows, length=6):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(rows))


def decode(model, ids_BT, cache="dynamic", prompt=4, **options):
    """The logits of every token behind the prompt, teacher-forced, and the cache."""
    if cache == "dynamic":
        kept = DynamicCache(config=model.config)
    else:
        kept = StaticCache(config=model.config, max_cache_len=ids_BT.shape[1] + 3)
    with torch.no_grad():
        model(ids_BT[:, :prompt], past_key_values=kept, use_cache=True)
        outputs = [
            model(ids_BT[:, i : i + 1], past_key_values=kept, use_cache=True, **options)
            for i in range(prompt, ids_BT.shape[1])
        ]
    return torch.cat([output.logits for output in outputs], dim=1), kept


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("family", FUSABLE)
def test_logits_and_cache_are_those_of_the_modules(family, kind, rows, cache, routed, steps):
    model, ids_BT = routed(family, kind), texts(rows)
    expected, kept = decode(model, ids_BT, cache)
    with fused_decoding(model):
        actual, own = decode(model, ids_BT, cache)
    assert steps == [4, 5]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert int(own.get_seq_length()) == int(kept.get_seq_length()) == 6
    for layer, other in zip(own.layers, kept.layers, strict=True):
        assert int(layer.get_seq_length()) == 6
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FUSABLE)
def test_half_precision_rounds_where_the_modules_do(family, dtype, routed, steps):
    model, ids_BT = routed(family, dtype=dtype), texts(2, 8)
    expected, _ = decode(model, ids_BT)
    with fused_decoding(model):
        actual, _ = decode(model, ids_BT)
    assert actual.dtype == dtype
    assert len(steps) == 4
    # on some processors sums differ in their last bit, and an expert whose score is at the threshold with them
    assert (actual - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16])
def test_routers_of_another_type_than_the_model(router, routed, steps):
    model, ids_BT = routed(dtype=torch.bfloat16), texts(2)
    for ffn in expert_ffns(model).values():
        ffn.selector.to(router)
    expected, _ = decode(model, ids_BT)
    with fused_decoding(model):
        assert (decode(model, ids_BT)[0] - expected).float().norm() < 0.01 * expected.float().norm()
    assert len(steps) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 4])
def test_generate_writes_the_same_tokens(rows, cache, routed, steps):
    model, ids_BT = routed(), texts(rows)
    mask_BT = torch.ones_like(ids_BT)
    for row in range(1, rows):  # left padding
        mask_BT[row, :row] = 0
    options = {"attention_mask": mask_BT, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    options |= {"pad_token_id": 0, "eos_token_id": None, "no_repeat_ngram_size": 1}
    expected = model.generate(ids_BT, **options)
    if cache == "static":
        options["cache_implementation"] = "static"
    with fused_decoding(model):
        for _ in range(2):
            steps.clear()
            assert model.generate(ids_BT, **options).equal(expected)
            assert steps == list(range(6, 13))
    assert "forward" not in model.__dict__
    beams = {**options, "num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    expected = model.generate(ids_BT, **beams)
    with fused_decoding(model):
        assert model.generate(ids_BT, **beams).equal(expected)


def test_threads_and_neighbours_change_no_bit(routed, steps):
    model, ids_BT = routed(), texts(4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fused_decoding(model):
                results.append(decode(model, ids_BT)[0])
        assert results[1].equal(results[0])
        assert results[2].equal(results[0])
    finally:
        torch.set_num_threads(threads)
    assert len(steps) == 6


def test_thresholds_and_routers_are_followed_in_place(routed, steps):
    model, ids_BT = routed(), texts(2)
    with fused_decoding(model):
        before, _ = decode(model, ids_BT)
        for ffn in expert_ffns(model).values():
            ffn.threshold = 0.999
        none, _ = decode(model, ids_BT)
        for ffn in expert_ffns(model).values():
            ffn.selector.bias.data.fill_(20.0)
        every, _ = decode(model, ids_BT)
    assert len(steps) == 6
    assert not none.equal(before)
    torch.testing.assert_close(every, decode(model, ids_BT)[0], rtol=1e-4, atol=1e-5)
    set_mode(model, "dense")
    torch.testing.assert_close(every, decode(model, ids_BT)[0], rtol=1e-4, atol=1e-5)


def _hook(model):
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: (torch.zeros(1, 1, 32), None))


def _activation(model):
    expert_ffns(model)["model.layers.1.mlp"].activation = nn.ReLU()


def _projection(model):
    attention = model.model.layers[0].self_attn
    attention.o_proj = copy.deepcopy(attention.o_proj)
    attention.o_proj.bias.data.add_(1.0)


def _weight(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.data * 2.0)


def _data(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data * 2.0


def _forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x


def _mode(model):
    set_mode(model, "soft")


CHANGES = (_hook, _activation, _projection, _weight, _data, _forward, _mode)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_decodes_by_its_modules(change, routed, steps, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    model, ids_BT = routed(), texts(1)
    with fused_decoding(model):
        before, _ = decode(model, ids_BT)
        steps.clear()
        change(model)
        with caplog.at_level(logging.WARNING, "lte_lightning"):
            actual, _ = decode(model, ids_BT)
        assert not steps
    assert "was changed within fused_decoding" in caplog.text
    assert actual.equal(decode(model, ids_BT)[0])
    assert not actual.equal(before)


def test_a_hook_between_two_tokens_is_noticed_at_once(routed, steps):
    model, ids_BT = routed(), texts(1)
    seen = []
    with fused_decoding(model), torch.no_grad():
        outputs = model(ids_BT[:, :4], use_cache=True)
        model(ids_BT[:, 4:5], past_key_values=outputs.past_key_values, use_cache=True)
        model.model.layers[1].mlp.up.register_forward_hook(lambda *_: seen.append(1))
        model(ids_BT[:, 5:], past_key_values=outputs.past_key_values, use_cache=True)
    assert (steps, seen) == ([4], [1])


def test_traces_and_other_contexts_go_the_ordinary_way(routed, steps):
    model, ids_BT = routed(), texts(1)
    with fused_decoding(model):
        with RouterTrace(model) as trace:
            decode(model, ids_BT)
        assert 0 < trace.sparsity() < 1
        with lte_lightning.equal_rows():
            decode(model, ids_BT)
        with torch.autocast("cpu", torch.bfloat16):
            decode(model, ids_BT)
        decode(model, ids_BT, labels=torch.zeros(1, 1, dtype=torch.long))
        decode(model, ids_BT, logits_to_keep=torch.tensor([0]))
        decode(model, texts(17))
        with pytest.raises(IndexError):
            decode(model, torch.full((1, 6), 10**6))
        assert not steps
        decode(model, ids_BT)
        assert len(steps) == 2
        steps.clear()
        decode(model, ids_BT, output_hidden_states=True)  # transformers leaves hooks behind, so this comes last
        assert not steps


def test_a_full_static_cache_is_refused_by_the_modules(routed, steps):
    model, ids_BT = routed(), texts(1)
    kept = StaticCache(config=model.config, max_cache_len=5)
    with fused_decoding(model), torch.no_grad():
        model(ids_BT[:, :4], past_key_values=kept, use_cache=True)
        model(ids_BT[:, 4:5], past_key_values=kept, use_cache=True)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids_BT[:, 5:], past_key_values=kept, use_cache=True)
    assert steps == [4]


def test_it_is_entered_once_and_left_whole(routed):
    model = routed()
    match = "replaced or compiled already"
    with fused_decoding(model), pytest.raises(UserError, match=match), fused_decoding(model):
        pass
    assert why_not_fused(copy.deepcopy(model)) == ""


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("mistral", None, r"sliding window \(4 tokens\)"),
        ("gpt2", None, "LLaMA, Mistral"),
        ("gemma", None, "layers are GemmaDecoderLayer"),
        ("llama", lambda model: set_mode(model, "soft"), "layer 0 selects no experts"),
        ("llama", lambda model: model.train(), "train mode"),
        ("llama", _hook, "layer 1 has a LlamaAttention that has forward hooks"),
        ("llama", lambda model: set_backend(model, "reference"), "backend 'reference'"),
        ("llama", lambda model: model.model.layers[0].input_layernorm.double(), "a norm"),
        ("llama", lambda model: setattr(model.config, "output_hidden_states", True), "hidden states"),
    ],
)
def test_other_models_are_refused_by_name(family, change, reason, routed):
    model = routed(family)
    if change:
        change(model)
    with pytest.raises(UserError, match=reason), fused_decoding(model):
        pass
    assert "forward" not in model.__dict__


def test_what_is_not_quantised_is_refused(routed):
    with pytest.raises(UserError, match="not a quantised language model"), fused_decoding(routed(kind=None)):
        pass


def test_without_a_compiler_it_is_refused(routed, monkeypatch):
    model = routed()
    monkeypatch.setattr(fusable, "library", lambda: None)
    with pytest.raises(UserError, match="not compiled"), fused_decoding(model):
        pass

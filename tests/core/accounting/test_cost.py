import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lte_lightning import LteConfig, convert
from lte_lightning.core.accounting.cost import GFLOP, _attention, flops_per_token, speedup_bound, token_cost
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.errors import UserError


@pytest.fixture(scope="module")
def llama_7b():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return convert(model, LteConfig(32, "contiguous", router_bias=False), progress=False)


# The paper's accounting


def test_llama_7b_dense(llama_7b):
    ffns = expert_ffns(llama_7b).values()
    assert {parameter.device.type for parameter in llama_7b.parameters()} == {"meta"}
    assert flops_per_token(llama_7b) / GFLOP == 12.0625
    assert sum(ffn.flops_dense() for ffn in ffns) / GFLOP == 8.0625
    assert sum(ffn.selector.flops_per_token() for ffn in ffns) / GFLOP == pytest.approx(0.0840, abs=5e-5)
    assert {ffn.experts for ffn in ffns} == {344}


# Table 1 by method and task, with the sparsity of the FFNs that each figure implies
LTE = [("XSum", 5.38, 0.839), ("E2E", 4.65, 0.930), ("WikiText", 6.59, 0.689)]
BASELINES = [
    ("Deja Vu, XSum", 7.92, 0.514),
    ("Deja Vu, E2E", 6.42, 0.700),
    ("Deja Vu, WikiText", 7.92, 0.514),
    ("MoEfication, XSum", 10.45, 0.200),
    ("ReLULLaMA + MoEfication, XSum", 8.27, 0.470),
    ("ReLULLaMA + MoEfication, E2E", 7.39, 0.580),
    ("ReLULLaMA + MoEfication, WikiText", 11.1, 0.119),
]


def implied_sparsity(model, gflops):
    """The sparsity, the same in all layers, at which the model costs this much: FLOPs are linear in it."""
    none, all_ = (flops_per_token(model, [sparsity] * 32) / GFLOP for sparsity in (0.0, 1.0))
    return (none - gflops) / (none - all_)


@pytest.mark.parametrize(("task", "gflops", "sparsity"), LTE)
def test_table_1_lte(llama_7b, task, gflops, sparsity):
    assert implied_sparsity(llama_7b, gflops) == pytest.approx(sparsity, abs=6e-4)
    # a unit of the last digit of the sparsity is 0.008 GFLOPs
    assert flops_per_token(llama_7b, [sparsity] * 32) / GFLOP == pytest.approx(gflops, abs=0.0095)


@pytest.mark.parametrize(("entry", "gflops", "sparsity"), BASELINES)
def test_table_1_baselines_are_charged_no_router(llama_7b, entry, gflops, sparsity):
    routers = sum(ffn.selector.flops_per_token() for ffn in expert_ffns(llama_7b).values()) / GFLOP
    assert implied_sparsity(llama_7b, gflops + routers) == pytest.approx(sparsity, abs=6e-4)


def test_extremes(llama_7b):
    dense = flops_per_token(llama_7b)
    routers = sum(ffn.selector.flops_per_token() for ffn in expert_ffns(llama_7b).values())
    assert flops_per_token(llama_7b, [0.0] * 32) == dense + routers
    assert flops_per_token(llama_7b, [1.0] * 32) == 4 * GFLOP + routers


def test_every_family_counts_its_own_weights(build, family):
    model = convert(build(family), LteConfig(16, "contiguous"), progress=False)
    width = model.config.hidden_size
    heads = getattr(model.config, "num_key_value_heads", 4)
    attention = 2 * (2 * width * width + 2 * width * heads * width // 4)
    gated = next(iter(expert_ffns(model).values())).gate is not None
    ffn = 2 * width * 96 * (3 if gated else 2)
    router = 2 * width * 6
    # One layer of an encoder, and one of a decoder that also looks at it.
    all_attention = (3 if model.config.is_encoder_decoder else 2) * attention
    assert flops_per_token(model) == all_attention + 2 * ffn
    assert flops_per_token(model, [0.25, 0.75]) == all_attention + ffn + 2 * router


def test_the_floor_is_charged_nothing(build):
    model = convert(build(), LteConfig(16, "contiguous", selector="none"), progress=False)
    assert flops_per_token(model, [1.0, 1.0]) == 2 * 2 * 4 * 32 * 32
    cost = token_cost(model, [1.0, 1.0])
    assert cost.ffn_bytes == 2 * 2 * 32  # two output biases in bfloat16


# What is true beyond it


def counted(model: PreTrainedModel, context: int) -> float:
    """FLOPs per token of a forward pass over `context` tokens, as torch counts them."""
    ids_BT = torch.randint(3, 64, (1, context), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")  # whose products torch can count on every device
    both = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
    # Falcon cannot be told afterwards: its products show where torch does them one by one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids_BT, **both)
    return counter.get_total_flops() / context


@pytest.mark.parametrize("context", [1, 13, 40])
def test_flops_are_those_that_torch_counts(build, context):
    for family, head in (("llama", "lm"), ("llama-biases-gqa-tied", "lm"), ("gpt2", "lm")):
        model = convert(build(family, head), LteConfig(16, "contiguous"), progress=False)
        # beyond the weights, rotary embeddings multiply half a head by each position
        rotary = 8 if family.startswith("llama") else 0
        assert 0 <= counted(model, context) - token_cost(model, context=context).flops <= rotary, family


def test_flops_of_a_single_token_in_every_family(build, family):
    model = convert(build(family), LteConfig(16, "contiguous"), progress=False)
    beyond = counted(model, 1) - token_cost(model, context=1).flops
    assert 0 <= beyond <= 8 or (family == "deberta-v2" and beyond > 0)  # whose scores of positions are left out


def test_flops_of_an_encoder():
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = convert(BertForMaskedLM(config), LteConfig(16, "contiguous"), progress=False)
    assert token_cost(model, context=10).flops == counted(model, 10)


def test_sparse_flops_differ_only_in_the_ffns(build):
    model = convert(build("llama", "lm"), LteConfig(16, "contiguous"), progress=False)
    dense, sparse = token_cost(model), token_cost(model, [0.5, 0.5])
    assert dense.flops - sparse.flops == dense.paper_flops - sparse.paper_flops > 0


def test_parameters_are_all_but_the_rows_of_embeddings(build):
    for family, head, untouched in (
        ("llama", "lm", 64 * 32 - 32),  # tokens
        ("gpt2", "classification", 64 * 32 - 32 + 40 * 32 - 32),  # tokens and positions
        ("llama-biases-gqa-tied", "lm", -32),  # the head reads the embedding whole; one row is read besides
    ):
        model = build(family, head)
        everything = sum(parameter.numel() for parameter in model.parameters())
        convert(model, LteConfig(16, "contiguous"), progress=False)
        assert token_cost(model).parameters == everything - untouched, family


def test_bytes_are_weights_and_cache(build):
    model = convert(build("llama", "lm"), LteConfig(16, "contiguous"), progress=False)
    weights, dense = token_cost(model, context=0), token_cost(model, context=10)
    assert weights.bytes == 2 * weights.parameters
    assert dense.bytes - weights.bytes == 2 * (2 * 2 * 32 * 10)  # keys and values of two layers in bfloat16
    assert token_cost(model, dtype=torch.float32, context=10).bytes == 2 * dense.bytes
    sparse = token_cost(model, [0.25, 0.75], context=10)
    router = 6 * 32 + 6
    assert dense.parameters - sparse.parameters == 3 * 32 * 96 - 2 * router
    assert (dense.ffn_bytes, sparse.ffn_bytes) == (2 * 6 * 32 * 96, 2 * (3 * 32 * 96 + 2 * router))
    # of neurons that do not run, biases are not read either; the output bias is
    biased = convert(build("llama-biases-gqa-tied", "lm"), LteConfig(16, "contiguous"), progress=False)
    saved = token_cost(biased).parameters - token_cost(biased, [1.0, 1.0]).parameters
    assert saved == 2 * (3 * 32 * 96 + 2 * 96 - router)


def small_decoders():
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {"intermediate_size": 96, "pad_token_id": 0} | common
    falcon = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "alibi": False, "num_ln_in_parallel_attn": 1}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**llama)),
        "grouped": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, head_dim=16, **llama)),
        "window": MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=7, **llama)),
        "one key": FalconForCausalLM(FalconConfig(**falcon, **common)),
    }


@pytest.mark.parametrize("name", ["llama", "grouped", "window", "one key"])
def test_the_cache_is_as_large_as_the_models_own(name, monkeypatch):
    model = small_decoders()[name].eval()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 12, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    if name == "window":  # the token itself is in the window, and not yet in the cache
        assert held == 2 * 2 * 2 * 8 * 6
        held = 2 * 2 * 2 * 8 * 7
    # Of a row only the layers matter here; theirs are where those of llama and gpt2 are.
    monkeypatch.setitem(FAMILIES, "mistral", FAMILIES["llama"])
    monkeypatch.setitem(FAMILIES, "falcon", FAMILIES["gpt2"])
    assert _attention(model, 12)[1] == held


def test_an_encoder_has_no_cache(build):
    model = convert(build("bert"), LteConfig(16, "contiguous"), progress=False)
    assert token_cost(model, context=0).bytes == token_cost(model, context=40).bytes


# The bound


@pytest.mark.parametrize(
    ("sparsity", "end_to_end", "ffn_alone"),
    [(0.25, 1.19, 1.32), (0.40, 1.34, 1.64), (0.50, 1.47, 1.96), (0.65, 1.72, 2.77), (0.80, 2.07, 4.75)],
)
def test_bounds_of_llama_7b(llama_7b, sparsity, end_to_end, ffn_alone):
    # Written down once from 65.5 % of the weights in FFNs and routers of 1.04 % of these, weights alone.
    dense, sparse = token_cost(llama_7b, context=0), token_cost(llama_7b, [sparsity] * 32, context=0)
    assert dense.ffn_bytes / dense.bytes == pytest.approx(0.655, abs=5e-4)
    assert speedup_bound(dense.bytes, sparse.bytes) == pytest.approx(end_to_end, abs=0.0051)
    assert speedup_bound(dense.ffn_bytes, sparse.ffn_bytes) == pytest.approx(ffn_alone, abs=0.0051)


def test_the_cache_lowers_the_bound(llama_7b):
    bounds = []
    for context in (0, 1024, 2048):
        dense, sparse = token_cost(llama_7b, context=context), token_cost(llama_7b, [0.5] * 32, context=context)
        bounds.append(speedup_bound(dense.bytes, sparse.bytes))
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > 1


def test_nothing_read_has_no_bound():
    assert speedup_bound(10, 0) == math.inf


# Bad input


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_sparsity_for_each_layer(build, count):
    model = convert(build(), LteConfig(16, "contiguous"), progress=False)
    with pytest.raises(UserError, match=f"{count} sparsities for 2 layers"):
        flops_per_token(model, [0.5] * count)
    with pytest.raises(UserError, match=f"{count} sparsities for 2 layers"):
        token_cost(model, [0.5] * count)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_a_sparsity_is_a_share(build, sparsity):
    model = convert(build(), LteConfig(16, "contiguous"), progress=False)
    with pytest.raises(UserError, match=f"sparsity is {sparsity}; .* from 0 to 1"):
        token_cost(model, [0.5, sparsity])


@pytest.mark.parametrize("context", [-1, 41])
def test_a_context_that_the_model_has_no_positions_for(build, context):
    model = convert(build(), LteConfig(16, "contiguous"), progress=False)
    assert token_cost(model, context=40).flops == token_cost(model).flops  # all that it has is the default
    with pytest.raises(UserError, match=rf"context is {context}; this bert takes 0 to 40 \(max_position_embeddings\)"):
        token_cost(model, context=context)


def test_a_model_that_was_not_converted(build):
    with pytest.raises(UserError, match=r"convert\(\) it first"):
        flops_per_token(build())
    with pytest.raises(UserError, match=r"convert\(\) it first"):
        token_cost(build())

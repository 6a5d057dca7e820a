import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lte_lightning import LteConfig, convert
from lte_lightning.core.convert import expert_ffns
from lte_lightning.core.cost import flops_per_token, selector_flops
from lte_lightning.core.errors import UserError

GIGA = 2**30


@pytest.fixture(scope="module")
def llama_7b():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return convert(model, LteConfig(32, "contiguous", router_bias=False), progress=False)


def test_llama_7b_dense(llama_7b):
    ffns = expert_ffns(llama_7b).values()
    assert {parameter.device.type for parameter in llama_7b.parameters()} == {"meta"}
    assert flops_per_token(llama_7b) == 4 * GIGA + sum(ffn.flops_dense() for ffn in ffns)
    assert sum(ffn.flops_dense() for ffn in ffns) / GIGA == 8.0625
    assert sum(selector_flops(ffn) for ffn in ffns) / GIGA == pytest.approx(0.0840, abs=5e-5)
    assert {ffn.experts for ffn in ffns} == {344}


@pytest.mark.parametrize(("sparsity", "gflops"), [(0.839, 5.38), (0.930, 4.65), (0.689, 6.59)])
def test_table_1(llama_7b, sparsity, gflops):
    # The sparsities are read off the paper's figures of FLOPs; a unit of their last digit is 0.008 GFLOPs.
    assert flops_per_token(llama_7b, [sparsity] * 32) / GIGA == pytest.approx(gflops, abs=0.0095)


def test_extremes(llama_7b):
    dense = flops_per_token(llama_7b)
    routers = sum(selector_flops(ffn) for ffn in expert_ffns(llama_7b).values())
    assert flops_per_token(llama_7b, [0.0] * 32) == dense + routers
    assert flops_per_token(llama_7b, [1.0] * 32) == 4 * GIGA + routers


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


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_sparsity_for_each_layer(build, count):
    model = convert(build(), LteConfig(16, "contiguous"), progress=False)
    with pytest.raises(UserError, match=f"{count} sparsities for 2 layers"):
        flops_per_token(model, [0.5] * count)


def test_a_model_that_was_not_converted(build):
    with pytest.raises(UserError, match=r"convert\(\) it first"):
        flops_per_token(build())

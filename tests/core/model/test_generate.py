"""Generation by converted models: with a cache, batched, padded, with beams."""

import pytest
import torch

from lte_lightning import LteConfig, convert, set_mode
from lte_lightning.core.model.experts import MODES, expert_ffns

LENGTHS, NEW = (7, 5, 2), 5


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def padded(texts, side):
    batch = {"input_ids": torch.zeros(len(texts), max(LENGTHS), dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, text in enumerate(texts):
        real = slice(-len(text), None) if side == "left" else slice(len(text))
        batch["input_ids"][row, real] = text
        batch["attention_mask"][row, real] = 1
    return batch


def padding_side(family):
    return "right" if family == "bart" else "left"  # its encoder has absolute positions


def generate(model, batch, **kwargs):
    """The new tokens, NEW of each text, none twice: models with random weights like to repeat one for ever."""
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, **kwargs}
    with torch.no_grad():
        return model.generate(**batch, no_repeat_ngram_size=1, suppress_tokens=[0], **kwargs)[:, -NEW:]


def with_all_experts_on(model, mode):
    convert(model, LteConfig(16, "kmeans", router_margin=50.0), progress=False)
    set_mode(model, mode)
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_all_experts_on_generate_what_the_original_does(build, texts, generative_family, beams):
    batch = padded(texts, padding_side(generative_family))
    expected = generate(build(generative_family, "lm"), batch, num_beams=beams)
    assert expected.shape == (3, NEW)
    model = with_all_experts_on(build(generative_family, "lm"), "dense")
    for mode in MODES:
        set_mode(model, mode)
        assert generate(model, batch, num_beams=beams).equal(expected)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_batching_padding_and_the_cache_change_no_token(build, scatter, texts, generative_family, mode):
    model = scatter(convert(build(generative_family, "lm"), LteConfig(16, "random"), progress=False))
    set_mode(model, mode)
    tokens = []
    for ffn in expert_ffns(model).values():
        ffn.register_forward_hook(lambda module, args, out: tokens.append(out.shape[:-1].numel()))
    batch = padded(texts, padding_side(generative_family))
    expected = generate(model, batch)
    assert tokens[-1] == len(texts), "the last step must have run on one new token of each text"
    assert generate(model, batch, use_cache=False).equal(expected)
    for text, new in zip(texts, expected, strict=True):
        assert generate(model, {"input_ids": text[None], "attention_mask": torch.ones(1, len(text))})[0].equal(new)
    if model.config.is_encoder_decoder:
        assert generate(model, padded(texts, "right")).equal(expected)


def test_routers_decide_what_is_generated(build, scatter, texts, generative_family):
    batch = padded(texts, padding_side(generative_family))
    model = scatter(convert(build(generative_family, "lm"), LteConfig(16, "random"), progress=False))
    generated = []
    for mode in ("dense", "hard"):
        set_mode(model, mode)
        generated.append(generate(model, batch))
    assert not generated[0].equal(generated[1])

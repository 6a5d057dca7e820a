"""What the table says of itself: who is refused, which stacks there are, and the page that lists the families."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

from lte_lightning import LteConfig, convert, from_pretrained, save_pretrained, set_mode
from lte_lightning.core.accounting.skeleton import skeleton
from lte_lightning.core.model import families
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.families import FAMILIES, UnsupportedModelError, find_row
from lte_lightning.core.model.parts import find_layers, find_parts

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def converted(model):
    return convert(model, LteConfig(16, "contiguous"), progress=False)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def snapshot(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == families.page(), "run: python -m lte_lightning.core.model.families > docs/families.md"


def test_the_page_has_every_family_once_as_it_is_tested(tested_as):
    _, *rows = re.findall(r"^\| `([\w-]+)` \| ([\w-]+) \|", PAGE.read_text(), re.MULTILINE)
    assert [model_type for model_type, _ in rows] == sorted(FAMILIES)
    assert dict(rows) == tested_as


def test_every_row_is_tested_once(build, row_families):
    found = [
        find_parts(find_layers(build(family))[0], find_row(build(family).config.model_type)).row
        for family in row_families
    ]
    rows = [family.row for family in FAMILIES.values()]
    table = [*rows, *(row.otherwise for row in rows)]
    assert len(set(found)) == len(found)
    assert set(found) == {row for row in table if row is not None}


def test_the_command_prints_the_page(capsys):
    families.main()
    assert capsys.readouterr().out == families.page()


def test_unknown_families_are_refused():
    model = AlbertModel(
        AlbertConfig(vocab_size=64, embedding_size=8, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    )
    before = snapshot(model)
    known = ", ".join(sorted(FAMILIES))
    with pytest.raises(UnsupportedModelError, match=rf"'albert' is not supported; known are {known}.*row of FAMILIES"):
        convert(model)
    assert snapshot(model) == before
    with pytest.raises(UnsupportedModelError, match="Did you mean 'roberta'"):
        find_row("robertta")


@pytest.mark.parametrize(
    ("model_type", "setting"),
    [
        ("mixtral", "num_local_experts=8"),
        ("qwen2_moe", "num_experts=60"),
        ("qwen3_moe", "num_local_experts=128"),
        ("olmoe", "num_experts=64"),
        ("deepseek_v2", "n_routed_experts=64"),
        ("deepseek_v3", "n_routed_experts=256"),
        ("switch_transformers", "num_experts=8"),
        ("gpt_oss", "num_local_experts=128"),
        ("phimoe", "num_local_experts=16"),
        ("dbrx", "moe_num_experts=4"),  # in a configuration inside
        ("llama4", "num_local_experts=16"),  # likewise
    ],
)
def test_mixtures_of_experts_are_refused(build, model_type, setting):
    model = build("llama")
    before = snapshot(model)
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModelError, match=rf"{model_type!r} is a mixture of experts already \({setting}\)"):
        convert(model)
    assert snapshot(model) == before


def test_a_real_mixture_of_experts_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    with pytest.raises(UnsupportedModelError, match=r"num_local_experts=2.*Start from a dense model"):
        convert(model)


def test_a_model_that_is_not_what_it_says(build):
    model = build("llama")
    model.config = build("t5").config
    with pytest.raises(UnsupportedModelError, match=r"LlamaFor.*a 't5' but has no 'encoder.block' or 'decoder.block'"):
        convert(model)


def test_stacks_keep_their_order(build, seq2seq_family):
    model = build(seq2seq_family)
    layers, ffns = find_layers(model), expert_ffns(converted(model))
    assert ["encoder" in name for name in ffns] == [True, False]
    assert [ffn in set(layer.modules()) for layer, ffn in zip(layers, ffns.values(), strict=True)] == [True, True]


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_t5_keeps_its_down_projections_in_float32(build, batch, family, tmp_path):
    build(family).save_pretrained(tmp_path)
    load = AutoModelForSeq2SeqLM.from_pretrained
    expected = logits(load(tmp_path, dtype=torch.float16), batch)
    model = converted(load(tmp_path, dtype=torch.float16))
    assert {(ffn.up.weight.dtype, ffn.down.weight.dtype) for ffn in expert_ffns(model).values()} == {
        (torch.float16, torch.float32)
    }
    assert logits(model, batch).equal(expected)
    for mode in ("soft", "hard"):
        set_mode(model, mode)
        assert torch.isfinite(logits(model, batch)).all()


def test_the_text_model_of_a_multimodal_one(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    text = {**sizes, "vocab_size": 64, "head_dim": 8, "num_key_value_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=5, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"'gemma3' is multimodal; take its text model .'gemma3_text'. out"):
        convert(whole)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="'gemma3' is multimodal"):
        skeleton(tmp_path / "whole")
    found = {"whole": whole, "Gemma3ForCausalLM": Gemma3ForCausalLM}
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # All but the lines that load and save
    exec("\n".join(line for line in recipe.splitlines() if "_pretrained(" not in line), found)
    ids = torch.arange(8, 20)[None]
    before = whole(ids).logits
    model = convert(found["text"].eval(), LteConfig(16, "contiguous"), progress=False)
    assert torch.equal(model(ids).logits, before)
    save_pretrained(model, tmp_path / "text")
    torch.testing.assert_close(from_pretrained(tmp_path / "text")(ids).logits, before, rtol=1e-5, atol=1e-5)

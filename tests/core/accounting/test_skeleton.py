import json

import pytest
from transformers import AlbertConfig, PreTrainedModel

from lte_lightning import LteConfig, convert, save_pretrained
from lte_lightning.core.accounting.cost import token_cost
from lte_lightning.core.accounting.skeleton import skeleton
from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_saved_model_is_built_alike_without_its_weights(build, family_and_head, tmp_path):
    model = build(*family_and_head)
    model.save_pretrained(tmp_path)
    built = skeleton(tmp_path, 16)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    convert(model, LteConfig(16, "contiguous"), progress=False)
    assert type(built) is type(model)  # conversion gives both the class that saves their routers
    assert shapes(built) == shapes(model)
    assert token_cost(built, [0.5, 0.25]) == token_cost(model, [0.5, 0.25])


@pytest.mark.parametrize("kwargs", [{"router_bias": False}, {"selector": "none"}, {"expert_size": 8}])
def test_an_lte_model_keeps_its_experts_and_selector(build, kwargs, tmp_path):
    model = convert(build("llama", "lm"), LteConfig(**{"expert_size": 16, "grouping": "contiguous"} | kwargs))
    save_pretrained(model, tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):  # none is read
        weights.unlink()
    built = skeleton(tmp_path / "model")
    assert lte_config(built) == lte_config(model)
    assert shapes(built) == shapes(model)
    assert token_cost(built, [0.5, 0.5]) == token_cost(model, [0.5, 0.5])
    size = lte_config(model).expert_size
    assert shapes(skeleton(tmp_path / "model", size)) == shapes(model)
    with pytest.raises(UserError, match=f"experts of {size} neurons; leave the expert size out"):
        skeleton(tmp_path / "model", 4)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"model_type": "bert"}, "BertForMaskedLM"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel"),
        ({"model_type": "bert", "architectures": ["OursForBert"]}, "BertForMaskedLM"),
    ],
)
def test_a_bare_configuration_becomes_a_language_model(config, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "config.json", str(tmp_path / "config.json")):
        built = skeleton(source)
        assert type(built).__name__ == name
        assert {ffn.expert_size for ffn in expert_ffns(built).values()} == {32}


def test_a_model_that_is_not_there(tmp_path):
    for source in (tmp_path / "nowhere", "nobody/nothing", "./none.json"):
        with pytest.raises(UserError, match=f"no folder or file {source}, and no model of that name"):
            skeleton(source)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json, so it is no Hugging Face model folder"):
        skeleton(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "llamma"}'])
def test_a_damaged_configuration(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot read the model configuration"):
        skeleton(tmp_path)


def test_a_family_that_is_not_in_the_table(tmp_path):
    AlbertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type 'albert' is not supported; known are"):
        skeleton(tmp_path)


def test_an_expert_size_that_does_not_divide(build, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expert_size=7 does not split 96"):
        skeleton(tmp_path, 7)

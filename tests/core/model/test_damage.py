"""Folders that lack weights, have others, hold NaN, or mix two models: refused, and what is wrong is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from lte_lightning import LteConfig, convert, from_pretrained, save_pretrained, set_mode
from lte_lightning.core.model.digest import differing, digest
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.folder import LayoutError, read_description
from lte_lightning.errors import UserError

FFN = "bert.encoder.layer.1.intermediate.dense"
GOLDEN = {
    "large": "int64 939fd84d12a8ce7c 4 12 20 28",
    "one": "bool 2351a2c301d92d9e 1",
    "small": "float32 3a85b41cc3933f43 15.625 46.875 78.125 109.375",
}


@pytest.fixture
def make(build, tmp_path):
    """`make(name, seed)`: the folder of a saved model in hard mode; another seed gives other weights and routers."""

    def make(name="saved", seed=0, **kwargs):
        model = convert(build(), LteConfig(16, "random", seed=seed), progress=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * seed)
        set_mode(model, "hard")
        return save_pretrained(model, tmp_path / name, **kwargs)

    return make


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def nan(key, value=float("nan")):
    return lambda tensors: tensors[key].view(-1)[-1].fill_(value)


WEIGHTS = {
    "ffn-missing": (lambda t: t.pop(f"{FFN}.weight"), rf"saved lacks weights of a Bert\w+: {FFN}\.weight"),
    "head-missing": (lambda t: t.pop("classifier.bias"), r"saved lacks weights of a Bert\w+: classifier\.bias"),
    "layer-more": (
        lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)}),
        r"saved has weights that a Bert\w+ of its config\.json does not take: bert\.encoder\.layer\.2\.output",
    ),
    "one-more": (
        lambda t: t.update({"bert.embeddings.more": torch.zeros(3)}),
        r"saved has weights that a Bert\w+ of its config\.json does not take: bert\.embeddings\.more",
    ),
    "ffn-nan": (nan(f"{FFN}.weight"), rf"saved holds NaN or infinite values: {FFN}\.weight"),
    "attention-inf": (
        nan("bert.encoder.layer.0.attention.self.query.bias", float("inf")),
        r"saved holds NaN or infinite values: bert\.encoder\.layer\.0\.attention\.self\.query\.bias",
    ),
    "changed": (
        nan("classifier.weight", 1.0),
        r"the weights' file is not what was saved with its routers \(classifier\.w",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(make, edit, message):
    folder = make()
    change(folder / "model.safetensors", edit)
    with pytest.raises(UserError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_routers_that_are_not_finite(make, value):
    folder = make()
    change(folder / "lte_routers.safetensors", nan(f"{FFN}.bias", value))
    with pytest.raises(UserError, match=rf"lte_routers\.safetensors holds NaN or infinite values: {FFN}\.bias"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        (["lte_routers.safetensors"], r"lte_routers\.safetensors is not what was saved with its weights"),
        (["model.safetensors"], r"the weights' file is not what was saved with its routers"),
        (["lte_routers.safetensors", "lte_config.json"], r"the weights' file is not what was saved with its routers"),
    ],
)
def test_files_of_another_model_of_the_same_shape(make, files, wrong):
    mine, other = make("mine"), make("other", seed=1)
    for name in files:
        shutil.copy(other / name, mine / name)
    with pytest.raises(LayoutError, match=rf"mine: {wrong} \(.* and \d+ more differ\)"):
        from_pretrained(mine)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("hidden_act", "relu", r"hidden_act: gelu there, relu here"),
        ("layer_norm_eps", 0.1, r"layer_norm_eps: 1e-12 there, 0.1 here"),
        ("id2label", {"0": "a", "1": "b", "2": "c"}, None),
        ("use_cache", False, None),
        ("hidden_dropout_prob", 0.5, None),
        ("pad_token_id", 7, r"pad_token_id: 0 there, 7 here"),
        ("is_causal", True, r"is_causal: None there, True here"),
    ],
)
def test_a_configuration_that_computes_something_else(setting, value, said, make):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    if said is None:
        from_pretrained(folder)
    else:
        with pytest.raises(LayoutError, match=rf"saved: config\.json is not what was saved \({said}\)"):
            from_pretrained(folder)


def test_settings_of_another_version_of_transformers(make):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"of_later_releases": 3}))
    with pytest.raises(LayoutError, match="of_later_releases: None there, 3 here"):
        from_pretrained(folder)
    (folder / "lte_config.json").write_text(json.dumps(read_description(folder) | {"transformers": "4.0.0"}))
    from_pretrained(folder)


def test_a_token_for_padding_where_there_was_none(build, tmp_path):
    model = convert(build("llama", "lm", 0.0), LteConfig(expert_size=16), progress=False)
    model.config.pad_token_id = None
    folder = save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 2}))
    from_pretrained(folder)


def test_settings_within_a_mapping(build, tmp_path):
    """Rotary positions of half of each head: `partial_rotary_factor` stands nowhere in the saved configuration."""
    model = convert(build("phi3", "lm", 0.0), LteConfig(expert_size=16), progress=False)
    folder = save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=r"rope_parameters\.partial_rotary_factor: .* there, 0\.5 here"):
        from_pretrained(folder)


def test_weights_of_another_model_beside_the_folder_s_own(make):
    """An option makes transformers read them in place of the files whose digest is right."""
    folder, other = make(), make("other", seed=1)
    torch.save(load_file(other / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(LayoutError, match=r"transformers loads other weights for .* than the file that this package"):
        from_pretrained(folder, use_safetensors=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    from_pretrained(folder, use_safetensors=False)


def test_a_digest_without_a_configuration_is_read(make):
    """As earlier versions wrote it."""
    folder = make()
    description = read_description(folder)
    assert description["digest"].pop("config")["hidden_act"] == "gelu"
    (folder / "lte_config.json").write_text(json.dumps(description))
    from_pretrained(folder)


def test_whole_numbers_in_place_of_weights(make):
    folder = make()
    description = read_description(folder)
    (folder / "lte_config.json").write_text(json.dumps({k: v for k, v in description.items() if k != "digest"}))
    change(folder / "model.safetensors", lambda t: t.update({f"{FFN}.weight": t[f"{FFN}.weight"].to(torch.int8)}))
    with pytest.raises(UserError, match=rf"no floating-point numbers: {FFN}\.weight \(torch\.int8\)"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["../other/{shard}", "{folder}/other/{shard}", 3, None])
def test_an_index_leads_to_no_other_folder(name, make, tmp_path):
    folder = make(max_shard_size="20KB")
    make("other", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key, shard = next(iter(content["weight_map"].items()))
    content["weight_map"][key] = name.format(folder=tmp_path, shard=shard) if isinstance(name, str) else name
    index.write_text(json.dumps(content))
    with pytest.raises(LayoutError, match=r"index\.json names the files of the weights, and is damaged"):
        from_pretrained(folder)


def test_infinite_levels_are_legal(build, batch, tmp_path):
    config = LteConfig(16, "random", selector="cats", target_sparsity=0.5)
    model = convert(build("llama", "lm"), config, progress=False)
    assert from_pretrained(save_pretrained(model, tmp_path / "saved")).lte_config == config


def test_folders_without_a_digest_are_read(make, batch):
    folder = make()
    description = read_description(folder)
    expected = logits(from_pretrained(folder), batch)
    (folder / "lte_config.json").write_text(json.dumps({k: v for k, v in description.items() if k != "digest"}))
    assert logits(from_pretrained(folder), batch).equal(expected)


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ({"format": 2}, "digest of format 2, this lte-lightning reads 1; install the version"),
        ({}, r"the digest in lte_config\.json of .* is damaged: KeyError"),
        ({"format": 1, "weights": 3, "routers": {}}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_a_digest_that_cannot_be_read(make, digest, message):
    folder = make()
    (folder / "lte_config.json").write_text(json.dumps(read_description(folder) | {"digest": digest}))
    with pytest.raises(LayoutError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one-file", "sharded"])
def test_what_another_tool_wrote_again_is_read(make, dtype, size):
    folder = make(max_shard_size="30KB")
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    for file in folder.glob("model*"):
        file.unlink()
    again.save_pretrained(folder, max_shard_size=size)
    assert from_pretrained(folder).dtype == dtype
    make("other", seed=1)
    shutil.copy(folder.parent / "other" / "lte_routers.safetensors", folder)
    shutil.copy(folder.parent / "other" / "lte_config.json", folder)
    with pytest.raises(LayoutError, match="the weights' file is not what was saved"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_that_a_model_is_loaded_in_does_not_matter(make, dtype):
    assert from_pretrained(make(), dtype=dtype).dtype == dtype


def test_values_that_half_precision_cannot_hold(make):
    folder = make()
    change(folder / "model.safetensors", nan("classifier.weight", 1e6))
    description = read_description(folder)
    del description["digest"]
    (folder / "lte_config.json").write_text(json.dumps(description))
    assert from_pretrained(folder).dtype == torch.float32
    with pytest.raises(UserError, match=r"NaN or infinite values: classifier\.weight"):
        from_pretrained(folder, dtype=torch.float16)


def test_pickled_weights_and_variants_are_checked(make, batch):
    folder = make(variant="fp32")
    expected = logits(from_pretrained(folder, variant="fp32"), batch)
    weights = load_file(folder / "model.fp32.safetensors")
    (folder / "model.fp32.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert logits(from_pretrained(folder), batch).equal(expected)
    weights["classifier.bias"] += 1
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(LayoutError, match=r"\(classifier\.bias differ\)"):
        from_pretrained(folder)


def test_the_base_model_alone(make, batch):
    folder = make()
    base, whole = from_pretrained(folder, AutoModel), from_pretrained(folder)
    with torch.no_grad():
        assert base(**batch).pooler_output.equal(whole.bert(**batch).pooler_output)
    assert [ffn.mode for ffn in expert_ffns(base).values()] == ["hard"] * 2


def test_another_head_is_new_and_the_base_is_not(build, tmp_path):
    folder = save_pretrained(convert(build("llama", "lm"), LteConfig(16), progress=False), tmp_path / "saved")
    assert from_pretrained(folder, AutoModelForSequenceClassification).score.weight.shape == (3, 32)
    change(folder / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks weights of a LlamaForSequenceClassification: model\.norm\.weight"):
        from_pretrained(folder, AutoModelForSequenceClassification)


def test_weights_that_were_changed_after_they_were_mapped(build, make):
    folder = make()
    weights = load_file(folder / "model.safetensors")
    model = convert(build(), LteConfig(16, "random", seed=0), progress=False)
    set_mode(model, "hard")
    weights["classifier.weight"] += 1.0
    with pytest.raises(LayoutError, match=r"\(classifier\.weight differ\)"):
        model.load_state_dict(weights)


def test_a_digest_covers_a_small_tensor_whole_and_a_large_one_in_blocks():
    small, large = torch.zeros(1000), torch.zeros(2_000_000)
    entries = digest({"small": small, "large": large, "empty": torch.zeros(0), "bits": torch.tensor(True)})
    assert differing(entries, {"small": small.clone(), "large": large.clone(), "empty": torch.zeros(0)}) == []
    for place in (0, 499, 999):
        assert differing(entries, {"small": small.index_fill(0, torch.tensor(place), 1e-30)}) == ["small"]
    assert differing(entries, {"large": large + 1e-30, "small": small.view(10, 100)}) == ["large", "small"]
    assert differing(entries, {"large": large.index_fill(0, torch.tensor(1_999_999), 1.0)}) == ["large"]


def test_entries_are_those_of_earlier_versions():
    """Folders that were saved before must be read, so an entry may not change."""
    tensors = {"large": torch.arange(2_000_000) % 251, "small": torch.arange(1000.0) / 8, "one": torch.tensor(True)}
    assert digest(tensors) == GOLDEN


def test_a_digest_of_another_type_is_compared_by_values():
    values = torch.linspace(-3, 3, 1001)
    entries = digest({"w": values})
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert differing(entries, {"w": values.to(dtype)}) == []
        assert differing(entries, {"w": (values * 1.05).to(dtype)}) == ["w"]
    assert differing(entries, {"w": values.to(torch.int8)}) == ["w"]
    assert differing(digest({"w": values.bfloat16()}), {"w": values.half()}) == []


def test_a_base_model_without_a_pooler(build, batch, tmp_path):
    model = convert(type(build().bert)(build().config, add_pooling_layer=False), LteConfig(16), progress=False).eval()
    folder = save_pretrained(model, tmp_path / "saved")
    with pytest.raises(UserError, match=r"lacks weights .*pooler.* load it with add_pooling_layer=False"):
        from_pretrained(folder)
    loaded = from_pretrained(folder, add_pooling_layer=False, backend="dense-mask")
    with torch.no_grad():
        assert loaded(**batch).last_hidden_state.equal(model(**batch).last_hidden_state)

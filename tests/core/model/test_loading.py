import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lte_lightning import LteConfig, convert, from_pretrained, quantize, save_pretrained, set_mode
from lte_lightning.core.model.experts import MODES, expert_ffns
from lte_lightning.core.model.loading import LayoutError, is_lte, read_description
from lte_lightning.errors import UserError

CONFIG = LteConfig(16, "kmeans", threshold=0.55, seed=3)
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
UNTIED = {"llama", "mistral", "qwen3", "phi3", "gpt_neox"}


@pytest.fixture
def routed(build, scatter):
    def routed(family="bert", head="classification"):
        return scatter(convert(build(family, head), CONFIG, progress=False))

    return routed


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(routed, batch, family_and_head, tmp_path):
    model, distinct = routed(*family_and_head), []
    for mode in MODES:
        set_mode(model, mode)
        expected = logits(model, batch)
        assert save_pretrained(model, tmp_path / "saved") == tmp_path / "saved"
        loaded = from_pretrained(tmp_path / "saved", backend="dense-mask")
        assert type(loaded) is type(model)
        assert not loaded.training
        assert loaded.lte_config == CONFIG
        assert {ffn.mode for ffn in expert_ffns(loaded).values()} == {mode}
        assert logits(loaded, batch).equal(expected)
        assert logits(model, batch).equal(expected), "saving changed the model"
        distinct.append(expected)
    assert content(save_pretrained(loaded, tmp_path / "again")) == content(tmp_path / "saved")
    assert not distinct[0].equal(distinct[1])
    assert not distinct[1].equal(distinct[2])


def test_others_read_it_as_the_dense_model(routed, build, batch, family_and_head, tmp_path):
    family, head = family_and_head
    model = routed(family, head)
    dense = logits(model, batch)
    set_mode(model, "hard")
    save_pretrained(model, tmp_path / "saved")
    plain, info = AUTO[head].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert [(name, type(module)) for name, module in plain.named_modules()] == [
        (name, type(module)) for name, module in build(family, head).named_modules()
    ]
    # A fused projection is one product here and two there.
    torch.testing.assert_close(logits(plain, batch), dense, rtol=1e-6, atol=1e-6 if ffn_is_fused(model) else 0.0)


def ffn_is_fused(model):
    return next(iter(expert_ffns(model).values())).row.fused


def test_tied_embeddings_stay_tied(routed, build, generative_family, tmp_path):
    model = routed(generative_family, "lm")
    loaded = from_pretrained(save_pretrained(model, tmp_path / "saved"))
    tied = model.config.tie_word_embeddings
    assert tied == (generative_family not in UNTIED)
    for each in (model, loaded):
        assert (each.get_input_embeddings().weight is each.get_output_embeddings().weight) == tied
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    distinct = {value.data_ptr() for value in build(generative_family, "lm").state_dict().values()}
    assert len(stored) == len(distinct), "a tied weight was written twice, or not at all"


def test_files(routed, tmp_path):
    model = routed()
    set_mode(model, "soft")
    folder = save_pretrained(model, tmp_path / "deep" / "saved", about={"stage": "router"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "lte_config.json",
        "lte_routers.safetensors",
        "model.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    description = json.loads((folder / "lte_config.json").read_text())
    assert description == read_description(folder)
    assert description["layout_version"] == 1
    assert description["lte"]["threshold"] == 0.55
    assert (description["mode"], description["model_type"]) == ("soft", "bert")
    assert description["about"] == {"stage": "router"}
    assert {key: tuple(value.shape) for key, value in load_file(folder / "lte_routers.safetensors").items()} == {
        f"bert.encoder.layer.{i}.intermediate.dense.{key}": shape
        for i in range(2)
        for key, shape in {"weight": (6, 32), "bias": (6,)}.items()
    }
    assert is_lte(folder)


@pytest.mark.parametrize("own_method", [False, True])
def test_files_are_for_whom_the_user_s_files_are_for(own_method, routed, tmp_path):
    """safetensors writes them for the user alone."""
    before = os.umask(0o027)
    try:
        routed().save_pretrained(tmp_path / "saved") if own_method else save_pretrained(routed(), tmp_path / "saved")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()} == {0o640}
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o750


@pytest.mark.parametrize("kwargs", [{"selector": "none"}, {"router_bias": False}])
def test_other_selectors_round_trip(build, batch, kwargs, tmp_path):
    model = convert(build(), LteConfig(16, "random", **kwargs), progress=False)
    set_mode(model, "hard")
    loaded = from_pretrained(save_pretrained(model, tmp_path / "saved"), backend="dense-mask")
    assert logits(loaded, batch).equal(logits(model, batch))
    assert loaded.lte_config == model.lte_config


def test_half_precision_round_trip(routed, batch, tmp_path):
    model = routed().to(torch.bfloat16)
    set_mode(model, "soft")
    loaded = from_pretrained(save_pretrained(model, tmp_path / "saved"), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert logits(loaded, batch).equal(logits(model, batch))


def test_an_earlier_save_is_replaced(routed, batch, tmp_path):
    model = routed()
    save_pretrained(model, tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").write_text("of the earlier one")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    save_pretrained(model, tmp_path / "saved")
    assert logits(from_pretrained(tmp_path / "saved", backend="dense-mask"), batch).equal(logits(model, batch))
    assert not (tmp_path / "saved" / "vocab.txt").exists()


def test_an_empty_folder_is_filled(routed, tmp_path):
    save_pretrained(routed(), tmp_path)
    assert is_lte(tmp_path)


@pytest.mark.parametrize("name", ["thesis.tex", "config.json"])
def test_foreign_folders_are_refused_untouched(routed, tmp_path, name):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(UserError, match="is not a saved LTE model; choose another folder"):
        save_pretrained(routed(), tmp_path / "saved")
    assert content(tmp_path) == {(tmp_path / "saved" / name).relative_to(tmp_path): b"{}"}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("size", [0, 1_500, 20_000])  # no file, the routers or the weights are too large
def test_a_full_disk_leaves_all_as_it_was(size, existing, quantised, routed, batch, no_file_larger_than, tmp_path):
    model = routed("gpt2", "lm")
    set_mode(model, "hard")
    if quantised:
        quantize(model.eval().requires_grad_(False), "int8")
    folder, expected = tmp_path / "saved", logits(model, batch)
    if existing:
        save_pretrained(model, folder)
    before = content(tmp_path)
    for save in (lambda: save_pretrained(model, folder), lambda: model.save_pretrained(folder)):
        with pytest.raises(UserError) as refused, no_file_larger_than(size):
            save()
        assert str(refused.value) == f"cannot write {folder}: File too large"
        assert content(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["saved"] * existing
    assert logits(model, batch).equal(expected)
    save_pretrained(model, folder)
    assert logits(from_pretrained(folder, backend="dense-mask"), batch).equal(expected)


def test_an_unconverted_model_is_not_saved(build, tmp_path):
    with pytest.raises(UserError, match=r"no expert FFNs; convert\(\) it first"):
        save_pretrained(build(), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(routed, tmp_path):
    return save_pretrained(routed(), tmp_path / "saved")


def test_another_layout_version_is_refused(saved):
    path = saved / "lte_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout_version": 2}))
    with pytest.raises(LayoutError, match=r"layout version 2, this lte-lightning reads 1; install the version"):
        from_pretrained(saved)


@pytest.mark.parametrize("name", ["lte_config.json", "lte_routers.safetensors"])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(LayoutError, match=f"saved has no {name}, so it is not a saved LTE model"):
        from_pretrained(saved)


def test_a_plain_folder_is_not_lte(build, tmp_path):
    build().save_pretrained(tmp_path)
    assert not is_lte(tmp_path)
    with pytest.raises(LayoutError, match="load a plain model with transformers"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.encode().replace(b"bert", b"b\xffrt"),
        lambda text: text.replace('"expert_size"', '"expert_length"'),
        lambda text: text.replace('"expert_size": 16', '"expert_size": "16"'),
        lambda text: text.replace('"expert_size": 16', '"expert_size": 0'),
        lambda text: text.replace('"lte"', '"etl"'),
        lambda text: text.replace('"dense"', '"dens"'),
    ],
    ids=["half", "empty", "list", "no-version", "bytes", "unknown-key", "text", "zero", "no-settings", "mode"],
)
def test_damaged_settings_are_named(saved, damage):
    path = saved / "lte_config.json"
    text = path.read_text()
    damaged = damage(text)
    assert damaged != text
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(LayoutError, match=r"lte_config.json.* is damaged: "):
        from_pretrained(saved)


def change_routers(folder, change):
    path = folder / "lte_routers.safetensors"
    routers = load_file(path)
    change(routers)
    save_file(routers, path)


LAST = "bert.encoder.layer.1.intermediate.dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update({f"{LAST}.weight": torch.zeros(5, 32)}), rf"does not fit the model at {LAST}: .*5, 32"),
        (lambda r: r.pop(f"{LAST}.bias"), rf"does not fit the model at {LAST}: .*Missing key.* \"bias\""),
        (lambda r: r.update({f"{LAST}.scale": torch.zeros(1)}), rf"does not fit the model at {LAST}: .*\"scale\""),
        (lambda r: r.update({"layer.7.weight": torch.zeros(1)}), r"weights that no layer takes: layer\.7\.weight"),
    ],
    ids=["shape", "missing", "unknown", "extra-layer"],
)
def test_routers_that_do_not_fit(saved, change, message):
    change_routers(saved, change)
    with pytest.raises(LayoutError, match=rf"(?s)lte_routers.safetensors.*{message}"):
        from_pretrained(saved)


def test_damaged_routers_are_named(saved):
    path = saved / "lte_routers.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LayoutError, match=r"lte_routers.safetensors is damaged"):
        from_pretrained(saved)


def test_an_architecture_that_transformers_lacks(saved, batch):
    path = saved / "config.json"
    path.write_text(path.read_text().replace("BertForSequenceClassification", "BertForTeaLeaves"))
    with pytest.raises(LayoutError, match="saved as 'BertForTeaLeaves', which transformers lacks; pass auto_class"):
        from_pretrained(saved)
    model = from_pretrained(saved, auto_class=AutoModelForSequenceClassification)
    assert logits(model, batch).shape == (3, 3)

"""`lte export`: what other programs load of a saved model is what the model computes."""

import contextlib
import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForSequenceClassification

import lte_lightning
from lte_lightning.cli import main
from lte_lightning.core.model.folder import CONFIG_FILE, ROUTERS_FILE


@pytest.fixture(scope="module")
def run(tiny_lm, make_lm_tokenizer, tmp_path_factory):
    """A run's folder: its model/ is a sparse decoder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.model)
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8, router_margin=0.1, router_scale=2.0))
    lte_lightning.set_mode(model, "hard")
    lte_lightning.save_pretrained(model, folder / "model")
    make_lm_tokenizer(chat=True).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def export(run, tmp_path):
    """`export("--to", "gguf", ...)` runs the command in an empty folder; it returns code, standard output and error."""

    def export(*args: object, folder: object = run) -> tuple[int, str, str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(["export", str(folder), *map(str, args)])
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    return export


IDS = torch.tensor([[5, 9, 30, 41, 7]])


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_dense_is_an_ordinary_folder_of_the_dense_function(run, export, tmp_path):
    code, out, err = export("--to", "dense", "--out", tmp_path / "dense")
    assert (code, out) == (0, f"{tmp_path / 'dense'}\n"), err
    assert "every neuron of the FFNs runs" in err
    files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= files
    assert not files & {CONFIG_FILE, ROUTERS_FILE}
    sparse = lte_lightning.from_pretrained(run)
    lte_lightning.set_mode(sparse, "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), logits(sparse))
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").chat_template
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "# LlamaForCausalLM, dense" in card
    assert "eval_results" not in card


def test_gguf_is_the_dense_function_for_llama_cpp(run, export, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra export is not installed")
    code, out, err = export("--to", "gguf", "--dtype", "fp16", "--out", "small.gguf")
    assert (code, out) == (0, "small.gguf\n"), err
    assert "texts of up to 256 tokens" in err
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    (down,) = (tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    saved = AutoModelForCausalLM.from_pretrained(run / "model").model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(torch.from_numpy(down.copy()), saved.detach().half(), atol=0, rtol=0)
    assert export("--to", "gguf")[:2] == (0, f"{run}/model.gguf\n")  # beside the model
    (run / "model.gguf").unlink()


def test_what_cannot_be_written_is_refused(run, tiny, tiny_lm, export, tmp_path):
    (tmp_path / "there").mkdir()

    def refused(message: str, *args: object, **options: object) -> None:
        code, out, err = export(*args, **options)
        assert (code, out) == (1, "")
        assert message in err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1

    refused("exists already", "--to", "gguf", "--out", "there")
    refused("there is no folder", "--to", "gguf", "--out", "nowhere/model.gguf")
    refused("--dtype is for GGUF files, and not for dense", "--to", "dense", "--dtype", "fp16")
    refused("has no lte_config.json, so it is not a saved LTE model", "--to", "dense", folder=tiny_lm.model)
    refused(f"(do you mean {run.name!r}?)", "--to", "dense", folder=f"{run}x")
    assert not list((tmp_path / "there").iterdir())
    bert = BertForSequenceClassification.from_pretrained(tiny.model)
    lte_lightning.convert(bert, lte_lightning.LteConfig(expert_size=8))
    lte_lightning.save_pretrained(bert, tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "bert")  # it has no EOS token
    refused("cannot write a bert model as GGUF; supported: gemma", "--to", "gguf", folder=tmp_path / "bert")


def test_a_missing_package_is_one_line(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, out, err = export("--to", "gguf", "--out", "model.gguf")
    assert (code, out) == (1, "")
    assert 'GGUF files need the package gguf: pip install "lte-lightning[export]"' in err.splitlines()[-1]

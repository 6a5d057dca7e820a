"""`lte generate`: the text is transformers' own, the sparsity that of the tokens it was made from."""

import contextlib
import io
import os
import re
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lte_lightning
from lte_lightning.cli import main

PROMPT = "the cat eats"
LINE = re.compile(r"(\d+) new tokens, [\d.]+ tokens/s, the first after [\d.]+ s, FFN sparsity ([\d.]+) %")


def save_sparse(model, tokenizer, folder, mode="hard"):
    torch.manual_seed(1)
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8, router_margin=0.1, router_scale=2.0))
    lte_lightning.set_mode(model, mode)
    lte_lightning.save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tiny_lm, make_lm_tokenizer, tmp_path_factory):
    """A folder of models: decoders, an encoder-decoder (`t5`), an encoder, and what is no model that writes."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_lm.model, root / "plain")
    tokenizer = make_lm_tokenizer(chat=True)
    save_sparse(AutoModelForCausalLM.from_pretrained(root / "plain"), tokenizer, root / "run" / "model")
    save_sparse(AutoModelForCausalLM.from_pretrained(root / "plain"), tokenizer, root / "soft", "soft")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(initializer_factor=4.0, **sizes, **tokens))
    save_sparse(t5, tokenizer, root / "t5")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(root / "encoder")
    shutil.copytree(root / "plain", root / "no-tokenizer", ignore=shutil.ignore_patterns("token*"))
    (root / "empty").mkdir()
    return root


def expected(model, folder, text, new_tokens, **options):
    """What transformers' own `generate` makes of it greedily: all tokens, and the new ones as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False, **options)
    ids_BT = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=2)
    first = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokenizer.decode(ids_BT[0, first:], skip_special_tokens=True), ids_BT.shape[1] - first


def traced(model, folder, new_tokens):
    """The same of a sparse model, and the sparsity of each layer at the tokens that new ones were made from, counted
    while they are made."""
    with torch.no_grad(), lte_lightning.RouterTrace(model) as trace:
        text, count = expected(model, folder, PROMPT, new_tokens)
    return text, count, [1 - (scores_NE[-count:] > 0.5).float().mean().item() for scores_NE in trace.scores().values()]


@pytest.mark.parametrize("name", ["run", "run/model"])
def test_a_sparse_model(name, folders, lightning):
    outcome = lightning(folders, None, "generate", name, "--prompt", PROMPT, "--max-new-tokens", 24)
    assert outcome.code == 0, outcome.err
    text, count, per_layer = traced(lte_lightning.from_pretrained(folders / "run/model"), folders / "run/model", 24)
    assert outcome.out == text + "\n"
    (line,) = outcome.err.splitlines()
    found = LINE.fullmatch(line)
    assert int(found[1]) == count > 2
    assert float(found[2]) == pytest.approx(100 * sum(per_layer) / len(per_layer), abs=0.06)
    assert 5 < float(found[2]) < 95


def test_its_dense_function_beside_it(folders, lightning):
    words = ("--dense", "--prompt", PROMPT, "--max-new-tokens", 24)
    outcome = lightning(folders, None, "generate", *words, "run")
    assert outcome.code == 0, outcome.err
    folder = folders / "run/model"
    sparse, _ = expected(lte_lightning.from_pretrained(folder), folder, PROMPT, 24)
    dense, count = expected(AutoModelForCausalLM.from_pretrained(folder), folder, PROMPT, 24)
    assert sparse != dense
    assert outcome.out == f"{sparse}\n{dense}\n"
    first, second = outcome.err.splitlines()
    assert LINE.fullmatch(first)
    assert re.fullmatch(
        rf"{count} new tokens, [\d.]+ tokens/s, the first after [\d.]+ s, dense; sparse is [\d.]+x as fast", second
    )


def test_a_plain_model_and_standard_input(folders, lightning, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    outcome = lightning(folders, None, "generate", "plain", "--max-new-tokens", 1)
    assert outcome.code == 0, outcome.err
    folder = folders / "plain"
    text, _ = expected(AutoModelForCausalLM.from_pretrained(folder), folder, PROMPT, 1)
    assert outcome.out == text + "\n"
    note, line = outcome.err.splitlines()
    assert note == "plain is a plain model: every neuron of its FFNs runs"
    assert re.fullmatch(r"1 new token, the first after [\d.]+ s, dense", line)


def test_a_model_of_the_soft_stage(folders, lightning):
    outcome = lightning(folders, None, "generate", "soft", "--prompt", PROMPT, "--max-new-tokens", 4)
    assert outcome.code == 0, outcome.err
    text, _ = expected(lte_lightning.from_pretrained(folders / "soft"), folders / "soft", PROMPT, 4)
    assert outcome.out == text + "\n"
    note, line = outcome.err.splitlines()
    assert note == "soft was saved in mode soft: every neuron of its FFNs runs"
    assert line.endswith(" s, soft")


def test_an_encoder_decoder(folders, lightning):
    outcome = lightning(folders, None, "generate", "t5", "--prompt", PROMPT, "--max-new-tokens", 12)
    assert outcome.code == 0, outcome.err
    text, count, per_layer = traced(lte_lightning.from_pretrained(folders / "t5"), folders / "t5", 12)
    assert outcome.out == text + "\n"
    found = LINE.fullmatch(outcome.err.splitlines()[0])
    assert int(found[1]) == count > 2
    assert float(found[2]) == pytest.approx(100 * sum(per_layer[2:]) / 2, abs=0.06)  # the first are the encoder's


def test_a_chat(folders, lightning):
    words = ("--chat", "--dtype", "bf16", "--threads", 1, "--max-new-tokens", 8)
    outcome = lightning(folders, None, "generate", "run", "--prompt", PROMPT, *words)
    assert outcome.code == 0, outcome.err
    folder = folders / "run/model"
    message = [{"role": "user", "content": PROMPT}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    model = lte_lightning.from_pretrained(folder, dtype=torch.bfloat16)
    assert asked != PROMPT
    assert outcome.out == expected(model, folder, asked, 8, add_special_tokens=False)[0] + "\n"


def test_a_temperature(folders, lightning):
    def text(seed):
        torch.manual_seed(seed)
        words = ("--prompt", PROMPT, "--temperature", 1.5, "--max-new-tokens", 16)
        outcome = lightning(folders, None, "generate", "run", *words)
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert text(0) == text(0) != text(1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised(kind, folders, lightning, tmp_path):
    folder = folders / "run" / "model"
    model = lte_lightning.from_pretrained(folder, quantize=kind)
    text, _ = expected(model, folder, PROMPT, 12)
    lte_lightning.save_pretrained(model, tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    words = ("--prompt", PROMPT, "--max-new-tokens", "12")
    for place, more in (("run", ("--quantize", kind, "--dense")), (str(tmp_path / "saved"), ())):
        outcome = lightning(folders, None, "generate", place, *words, *more)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith(text)
        first, *rest = outcome.err.splitlines()
        assert LINE.match(first)
        assert first.endswith(f" %, {kind}")
        assert len(rest) == len(more) // 2
    outcome = lightning(
        folders, None, "generate", str(tmp_path / "saved"), *words, "--quantize", kind, "--dtype", "bf16"
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_plain_model_quantised_runs_every_neuron(kind, folders, lightning):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain").eval()
    lte_lightning.convert(model, lte_lightning.LteConfig(grouping="contiguous", expert_size=32), progress=False)
    lte_lightning.quantize(model, kind)  # in mode dense: no router is asked
    text, _ = expected(model, folders / "plain", PROMPT, 12)
    words = ("--prompt", PROMPT, "--max-new-tokens", "12", "--quantize", kind)
    outcome = lightning(folders, None, "generate", "plain", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(text)
    first, last = outcome.err.splitlines()
    assert first == "plain is a plain model: every neuron of its FFNs runs"
    assert last.endswith(f", dense, {kind}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "no folder ./nowhere"),
        (["nowhere"], "no folder nowhere, and no model of that name in the cache or on the hub"),
        (["x" * 5000], f"{'x' * 60}... has 5000 letters: no file may be named so"),
        (["empty"], "empty holds no model: it has no config.json, and no model/config.json as a run has"),
        (["plain/config.json"], "plain/config.json is a file; name the folder of a model"),
        (["encoder"], "encoder is a BertForMaskedLM, which does not generate text"),
        (["no-tokenizer"], "tokenizer 'no-tokenizer' "),
        (["plain", "--prompt", "cat " * 300], "max_position_embeddings"),
        (["plain", "--max-new-tokens", "255"], "255 new ones are more than plain takes (256, its max_pos"),
        (["plain", "--prompt", ""], "the prompt is empty"),
        (["plain", "--prompt", "a\udcff"], "the prompt is not UTF-8 text"),
        (["plain", "--chat"], "the tokenizer of plain has no chat template; leave --chat out"),
        (["plain", "--dense"], "--dense is for models that select experts, and plain is a plain model"),
        (["plain", "--backend", "cpu"], "--backend is for models that select experts, and plain is a plain model"),
        (["run", "--backend", "gpu"], "unknown backend 'gpu'; there are auto,"),
        (["run", "--dtype", "int3"], "unknown dtype 'int3'; there are auto,"),
        (["run", "--device", "tpu"], "unknown device 'tpu'"),
        (["run", "--temperature", "-1"], "--temperature is -1.0; it must be 0 (greedy) or a positive number"),
        (["run", "--temperature", ".nan"], "--temperature is nan"),
        (["run", "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["run", "--quantize", "int2"], "unknown quantisation 'int2'; there are int8, int4"),
        (["plain", "--quantize", "int8", "--device", "cuda"], "--device is cuda, and "),
        (["run", "--threads", "0"], "--threads is 0; it must be at least 1"),
    ],
)
def test_bad_input(words, message, folders, lightning):
    prompt = [] if "--prompt" in words else ["--prompt", PROMPT]
    outcome = lightning(folders, None, "generate", *words, *prompt)
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1


def test_a_reader_that_has_seen_enough(folders, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, contextlib.redirect_stdout(pipe), pytest.raises(SystemExit) as stop:
        main(["generate", str(folders / "plain"), "--prompt", PROMPT, "--max-new-tokens", "4"])
    assert stop.value.code == 141
    assert "Error" not in capfd.readouterr().err


def test_damaged_weights(folders, lightning, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "plain")
    weights = tmp_path / "plain" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    outcome = lightning(tmp_path, None, "generate", "plain", "--prompt", PROMPT)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: cannot load the model plain: ")
    assert len(outcome.err.splitlines()) == 1

"""`lte bench --against` and `--scope generate`: tiny models in the engines themselves."""

import copy
import csv
import ctypes
import functools
import gc
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)

import lte_lightning
from lte_lightning.bench import main
from lte_lightning.bench.decoding import Stepper, even_routers, set_biases, sparse_twin
from lte_lightning.bench.engines import ENGINES
from lte_lightning.bench.jobs import Job
from lte_lightning.bench.narrow import narrowed
from lte_lightning.bench.rates import draw_rates, read_rates
from lte_lightning.bench.whole import find_whole, typed_copy
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.quantize_plain import quantize_plain
from lte_lightning.core.routing.calibrate import calibrate
from lte_lightning.errors import UserError

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
# OpenVINO and the exporters say much of their own parts when they are first imported
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(make_lm_tokenizer, tmp_path_factory):
    """A folder with a sparse decoder `lm`, the `plain` one it was made from, and a sparse classifier `bert`."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_lm_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **SIZES)
    models = {
        "plain": AutoModelForCausalLM.from_config(config),
        "bert": AutoModelForSequenceClassification.from_config(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)
        ),
    }
    models["plain"].save_pretrained(root / "plain")
    models["lm"] = models.pop("plain")
    for name, model in models.items():
        lte_lightning.convert(
            model, lte_lightning.LteConfig(expert_size=32, router_margin=0.1, router_scale=2.0), progress=False
        )
        lte_lightning.set_mode(model, "hard")
        lte_lightning.save_pretrained(model, root / name)
    for folder in root.iterdir():
        tokenizer.save_pretrained(folder)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(model)`: where engines write a model for the first of their types, and read it for the others."""
    return functools.cache(tmp_path_factory.mktemp)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def job_of(folder, tmp_path, sequences=1, length=16, new_tokens=8):
    whole = find_whole(str(folder), None, "auto")
    batch = whole.batch(sequences, length, CPU)
    return Job(whole.dense, whole.tokenizer, batch, new_tokens, 1, [batch], tmp_path)


def started(name, dtype, job):
    engine = ENGINES[name]
    for package in (*engine.packages, *engine.types[dtype]):
        pytest.importorskip(package, reason="the extra bench is not installed")
    return engine.start(job, dtype)


CASES = [(name, dtype) for name, engine in ENGINES.items() for dtype in engine.types]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_decoder_in_each_engine(name, dtype, folders, written):
    job = job_of(folders / "lm", written("lm"), sequences=1 if name == "llama.cpp" else 2)
    found = started(name, dtype, job)
    assert 0 < found.arm() < math.inf
    assert 0 < found.arm() < math.inf  # the prompt is read anew
    if found.logits is None:  # llama.cpp's: of the weights that it was given
        model = found.model()
        found_BTV = model(**job.batch).logits
    else:
        found_BTV = found.logits(job.batch)
    expected_BTV = job.model(**job.batch).logits
    error = ((found_BTV - expected_BTV).norm() / expected_BTV.norm()).item()
    assert error < {"f32": 0.02, "bf16": 0.03, "int8": 0.05, "int4": 0.3}[dtype]
    assert (error == 0) == (name == "llama.cpp" and dtype == "f32")


@pytest.mark.parametrize(("name", "dtype"), [("openvino", "f32"), ("openvino", "int8"), ("onnxruntime", "int8")])
def test_a_classifier_in_each_engine(name, dtype, folders, written):
    job = job_of(folders / "bert", written("bert"), sequences=3, length=16, new_tokens=None)
    found = started(name, dtype, job)
    assert 0 < found.arm() < math.inf
    padded = {key: value.clone() for key, value in job.batch.items()}
    padded["attention_mask"][:, 9:] = 0
    for batch in (job.batch, padded):
        torch.testing.assert_close(found.logits(batch), job.model(**batch).logits, atol=0.02, rtol=0.05)


def test_llama_cpp_decodes_one_text(folders, tmp_path):
    with pytest.raises(UserError, match=r"on one sequence of a decoder only"):
        started("llama.cpp", "bf16", job_of(folders / "lm", tmp_path, sequences=2))


def test_table_csv_picture_and_the_report(folders, tmp_path, capsys, monkeypatch):
    """The engines that are absent are named with the line that installs them."""
    pytest.importorskip("openvino", reason="the extra bench is not installed")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    file = tmp_path / "out.csv"
    words = "--against llama.cpp,openvino,onnxruntime --dtype bf16,int8 --repeats 2 --new-tokens 4 --ways eager"
    words += " --threads 1 --device cpu"
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert main([str(folders / "lm"), *words.split(), "--csv", str(file)]) == 0
    said = capsys.readouterr()
    line = 'pip install "lte-lightning[bench]"'
    assert f"llama.cpp is not measured: xllamacpp is not installed; {line}" in said.err
    assert f"onnxruntime is not measured: onnxruntime and onnxscript are not installed; {line}" in said.err
    assert f"openvino is not measured in int8: nncf is not installed; {line}" in said.err
    assert said.err.count("nncf is not installed") == 1
    rows = rows_of(file)
    names = [(row["engine"], row["dtype"], row["way"]) for row in rows]
    assert names == [
        ("dense", "bf16", "eager"),
        ("ours", "bf16", "eager"),
        ("ours", "int8", "eager"),
        ("openvino", "bf16", ""),
        ("narrow", "int8", "eager"),
    ]
    base = float(rows[0]["tokens_per_second"])
    for row in rows:
        rate = float(row["tokens_per_second"])
        assert float(row["least"]) <= rate <= float(row["most"])
        assert float(row["ratio"]) == pytest.approx(rate / base, rel=2e-3)
        assert (row["phase"], row["sequences"], row["new_tokens"], row["threads"]) == ("decode", "1", "4", "1")
        assert (float(row["sparsity"]) > 0.1) == (row["engine"] in ("ours", "narrow"))
        assert row["metric"] == ""
    assert "ours, times as fast as" in said.out
    assert "b: ours int8 eager at" in said.out
    assert (tmp_path / "out.png").stat().st_size > 1000
    read = [rate for _, rate in read_rates(file)]
    assert [(rate.engine, rate.dtype, rate.way) for rate in read] == names


def test_a_classifier_is_compared_in_a_forward_pass(folders, tmp_path):
    pytest.importorskip("openvino", reason="the extra bench is not installed")
    file = tmp_path / "out.csv"
    words = "--against openvino --dtype bf16 --tokens 2x8 --repeats 1 --ways eager --threads 1 --sparsity 0.5"
    assert main([str(folders / "bert"), *words.split(), "--csv", str(file)]) == 0
    assert [(row["engine"], row["phase"], row["sequences"], row["length"]) for row in rows_of(file)] == [
        (engine, "forward", "2", "8") for engine in ("dense", "ours", "openvino")
    ]


@pytest.mark.parametrize("name", ["lm", "plain"])
def test_what_is_generated(name, folders, tmp_path):
    file = tmp_path / "out.csv"
    words = "--scope generate --dtype bf16,int4 --tokens 1,2 --sparsity 0.25,0.75 --repeats 1 --new-tokens 4"
    words += " --threads 1 --ways eager --device cpu"
    assert main([str(folders / name), *words.split(), "--csv", str(file)]) == 0
    rows = rows_of(file)
    assert [(row["engine"], row["dtype"], row["sequences"]) for row in rows] == [
        (engine, dtype, sequences)
        for sequences in ("1", "2")
        for engine, dtype in (("dense", "bf16"), *(("ours", dtype) for dtype in ("bf16", "bf16", "int4", "int4")))
    ]
    for row in rows[1:5]:  # of four experts, over a prompt of 32
        assert min(abs(float(row["sparsity"]) - wanted) for wanted in (0.25, 0.75)) < 0.1


def test_compiled_steps_are_measured_beside_eager_ones(folders, tmp_path):
    file = tmp_path / "out.csv"
    words = "--scope generate --dtype f32 --repeats 1 --new-tokens 3 --threads 1 --device cpu"
    assert main([str(folders / "lm"), *words.split(), "--csv", str(file)]) == 0
    assert [(row["engine"], row["way"]) for row in rows_of(file)] == [
        (engine, way) for engine in ("dense", "ours") for way in ("eager", "compiled")
    ]


def test_fused_steps_are_measured_and_said_where_they_are_not(folders, tmp_path, capsys):
    file = tmp_path / "out.csv"
    words = "--scope generate --dtype bf16,int8,int4 --repeats 1 --new-tokens 3 --threads 1 --device cpu"
    assert main([str(folders / "lm"), *words.split(), "--ways", "eager,fused", "--csv", str(file)]) == 0
    assert [(row["engine"], row["dtype"], row["way"]) for row in rows_of(file)] == [
        ("dense", "bf16", "eager"),
        ("ours", "bf16", "eager"),
        *(("ours", dtype, way) for dtype in ("int8", "int4") for way in ("eager", "fused")),
    ]
    said = capsys.readouterr().err
    assert "ours bf16 is not measured fused: it is not a quantised language model" in said
    assert said.count("not measured fused") == 1
    # the dense model, which ratios are to, has no such way
    words += " --ways fused --sparsity 0.5"
    assert main([str(folders / "plain"), *words.split(), "--csv", str(file)]) == 0
    assert [(row["engine"], row["way"]) for row in rows_of(file)] == [("dense", "eager"), *[("ours", "fused")] * 2]


class SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def is_there(stack):
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= stack.start < last:
            return True
    return False


@pytest.mark.parametrize("name", ["openvino", "llama.cpp"])
def test_a_narrower_dense_model_is_measured_beside_int8(name, folders, tmp_path):
    for package in ENGINES[name].missing("int8"):
        pytest.importorskip(package, reason="the extra bench is not installed")
    file = tmp_path / "out.csv"
    words = f"--against {name} --dtype int8 --repeats 1 --new-tokens 3 --threads 1 --ways eager,fused --sparsity 0.5"
    assert main([str(folders / "lm"), *words.split(), "--csv", str(file)]) == 0
    if sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack := SignalStack()))
        assert not stack.start or is_there(stack)  # or the next signal, such as Ctrl+C, is a segmentation fault
    rows = {(row["engine"], row["way"]): row for row in rows_of(file)}
    assert list(rows)[-3:] == [(name, ""), ("narrow", "fused"), (f"{name} narrow", "")]
    for engine in (("narrow", "fused"), (f"{name} narrow", "")):
        assert float(rows[engine]["sparsity"]) == pytest.approx(0.5)  # two of four times 32 neurons
    read = [rate for _, rate in read_rates(file)]
    assert read[-1].name == f"{name} narrow int8 at 50%"
    draw_rates([replace(rate, quality=1.0 + i, metric="loss") for i, rate in enumerate(read)], tmp_path / "a.svg")
    assert f"{name} narrow int8 at 50%" in (tmp_path / "a.svg").read_text()


KINDS = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=99, **SIZES)),
    "bert": lambda: AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=99, **SIZES)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=99, n_embd=64, n_head=4, n_inner=128, n_layer=2, bos_token_id=1, eos_token_id=2)
    ),
    "phi3": lambda: AutoModelForCausalLM.from_config(Phi3Config(vocab_size=99, pad_token_id=0, **SIZES)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_narrower_model_is_the_dense_one_without_its_least_active_neurons(name):
    torch.manual_seed(0)
    dense = KINDS[name]().eval()
    batch = {"input_ids": torch.randint(3, 99, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    batch["attention_mask"][2:, 7:] = 0
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model, left_out = narrowed(dense, 0.7, [batch])
    assert left_out == pytest.approx(0.75)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    # the same choice by the selector, of the whole model
    lte = lte_lightning.LteConfig(expert_size=1, grouping="contiguous", selector="narrow", target_sparsity=left_out)
    twin = lte_lightning.convert(copy.deepcopy(dense), lte, progress=False)
    calibrate(twin, iter([(partial(twin, **batch), (batch["attention_mask"],))]), 4096)
    lte_lightning.set_mode(twin, "hard")
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, atol=1e-5, rtol=1e-4)
    # rounded, all of it runs
    for kind, error in (("int8", 0.03), ("int4", 0.3)):
        rounded_BTV = quantize_plain(copy.deepcopy(model), kind)(**batch).logits
        expected_BTV = model(**batch).logits
        assert ((rounded_BTV - expected_BTV).norm() / expected_BTV.norm()).item() < error
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())


def test_a_named_shape(tmp_path, monkeypatch):
    from lte_lightning.bench.subject import SHAPES

    monkeypatch.setitem(SHAPES, "tiny", LlamaConfig(vocab_size=256, **SIZES))
    file = tmp_path / "out.csv"
    words = "tiny --layers 1 --scope generate --ways eager --repeats 1 --new-tokens 2 --threads 1 --device cpu"
    assert main([*words.split(), "--csv", str(file)]) == 0
    dense, ours = rows_of(file)
    assert (dense["sparsity"], ours["engine"]) == ("0.0", "ours")
    assert float(ours["sparsity"]) == pytest.approx(0.8, abs=0.1)


@torch.no_grad()
def test_a_step_that_moves_itself_along_decodes_as_the_model_does(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain").eval()
    prompt_BT = find_whole(str(folders / "plain"), None, "auto").batch(2, 9, CPU)["input_ids"]
    expected = model.generate(prompt_BT, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[:, 9:]
    stepper = Stepper(model, prompt_BT, 6)
    for _ in range(2):  # and once more from the beginning
        stepper.read()
        made = [stepper.token_BT.clone()]
        for _ in range(5):
            stepper.step()
            made.append(stepper.token_BT.clone())
        assert torch.equal(torch.cat(made, dim=1), expected)


def test_a_copy_in_another_type_shares_nothing_and_keeps_ties(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain").eval()
    model.tie_weights()
    twin = typed_copy(model, "bf16")
    expected = torch.nn.Module.to(copy.deepcopy(model), torch.bfloat16).state_dict()
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert twin.config.dtype == torch.bfloat16
    assert all(torch.equal(weight, expected[name]) for name, weight in twin.state_dict().items())
    assert len(list(twin.parameters())) == len(list(model.parameters()))  # as many are tied
    again = typed_copy(model, "f32")
    assert not {t.data_ptr() for t in again.parameters()} & {t.data_ptr() for t in model.parameters()}


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_routers_are_set_to_a_share_and_back(threshold, folders):
    model = sparse_twin(AutoModelForCausalLM.from_pretrained(folders / "plain").eval(), "f32")
    for ffn in expert_ffns(model).values():
        ffn.threshold = threshold
    batch = {"input_ids": torch.randint(3, 300, (4, 50)), "attention_mask": torch.ones(4, 50, dtype=torch.long)}

    def sparsity():
        with torch.no_grad(), lte_lightning.RouterTrace(model, batch["attention_mask"]) as trace:
            model(**batch)
        return trace.sparsity()

    low = even_routers(model, 0.25, batch)
    assert sparsity() == pytest.approx(0.25, abs=0.02)
    even_routers(model, 0.75, batch)
    assert sparsity() == pytest.approx(0.75, abs=0.02)
    set_biases(model, low)
    assert sparsity() == pytest.approx(0.25, abs=0.02)


def test_other_selectors_have_no_bias_to_set(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain").eval()
    config = lte_lightning.LteConfig(selector="random", expert_size=32, target_sparsity=0.5)
    lte_lightning.convert(model, config, progress=False)
    lte_lightning.set_mode(model, "hard")
    with pytest.raises(UserError, match=r"--sparsity sets the biases of linear routers, and .* has a Random"):
        even_routers(model, 0.5, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{lm} --against lama.cpp", "unknown engine 'lama.cpp' in --against; did you mean llama.cpp?"),
        ("{lm} --against vllm", "unknown engine 'vllm' in --against; there are llama.cpp, openvino, onnxruntime"),
        ("{lm} --against openvino --dtype int9", "unknown dtype 'int9' (do you mean 'int8'?)"),
        ("{lm} --against openvino --ways egger", "unknown way 'egger' (do you mean 'eager'?)"),
        ("{lm} --against openvino --rivals", "--rivals is for the scopes ffn and model"),
        ("{lm} --against openvino --scope ffn", "--scope is ffn; generate does not combine"),
        ("{lm} --against openvino --layers 2", "--layers 2 is for named shapes"),
        ("{lm} --scope generate --tokens 2x8", "--tokens is 2x8; with --scope generate it is the number of seq"),
        ("{lm} --scope generate --ways captured --device cpu", "captured is a CUDA graph, and torch runs on the CPU"),
        ("{lm} --new-tokens 4", "--new-tokens is for whole models: add --scope generate or --against"),
        ("{bert} --scope generate --device cpu", "a BertForSequenceClassification, which does not generate text"),
        ("{bert} --against openvino --tokens 1x70", "has positions for 62 tokens, and --tokens asks for 70"),
        ("{root}/plian --scope generate", "do you mean 'plain'?"),
        ("smollm2-135n --scope generate", "no shape of that name (do you mean 'smollm2-135m'?)"),
        ("{lm} --against openvino --csv {root}/nowhere/a.csv", "no folder"),
        ("{lm} --against openvino --data a.yaml --sparsity 0.5", "--data measures quality, but --sparsity replaces"),
    ],
)
def test_bad_input(words, message, folders, capsys):
    words = words.format(root=folders, lm=folders / "lm", bert=folders / "bert")
    assert main(words.split()) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "tokens/s" not in said.out


def test_the_picture_has_quality_where_it_was_measured(folders, tmp_path):
    from dataclasses import replace

    file = tmp_path / "out.csv"
    words = "--scope generate --repeats 1 --new-tokens 2 --threads 1 --ways eager --device cpu"
    assert main([str(folders / "lm"), *words.split(), "--csv", str(file)]) == 0
    rates = [rate for _, rate in read_rates(file)]
    bars, points = tmp_path / "bars.svg", tmp_path / "points.svg"
    draw_rates(rates, bars)
    draw_rates([replace(rate, metric="perplexity", quality=12.0) for rate in rates], points)
    assert "perplexity" not in bars.read_text()
    assert "perplexity" in points.read_text()

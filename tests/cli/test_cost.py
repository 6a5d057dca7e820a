"""`lte cost`, and how the command line finds its commands."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import yaml
from transformers import AlbertConfig, LlamaConfig

from lte_lightning.cli import COMMANDS
from lte_lightning.data.packaged import MODEL

LLAMA = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    LLAMA.save_pretrained(folder)
    return folder


@pytest.fixture
def cost(lightning, tmp_path):
    """`cost(*args)` runs `lte cost`."""
    return lambda *args: lightning(tmp_path, None, "cost", *args)


def figures(outcome):
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    return json.loads(outcome.out)


def cells(text, label):
    (line,) = (line for line in text.splitlines() if f"│ {label}" in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_json_of_llama_7b(llama, cost):
    found = figures(cost("--model", llama, "--sparsity", 0.5, "--context", 0, "--json"))
    assert found["paper_gflops_per_token"]["dense"] == 12.0625
    # half of 8.0625, and routers of 0.0840
    assert found["paper_gflops_per_token"]["sparse"] == pytest.approx(12.0625 - 8.0625 / 2 + 0.0840, abs=1e-4)
    head = 2 * 4096 * 32000
    assert found["flops_per_token"]["dense"] == 12.0625 * 2**30 + head
    embedding, row = 32000 * 4096, 4096
    assert found["parameters_per_token"]["dense"] == 6_738_415_616 - embedding + row
    assert found["bytes_per_token"]["dense"] == 2 * found["parameters_per_token"]["dense"]
    assert found["bound"] == {"dense": 1.0, "sparse": pytest.approx(1.47, abs=0.005)}
    assert found["ffn_bound"] == {"dense": 1.0, "sparse": pytest.approx(1.96, abs=0.005)}
    assert found["router_share_of_ffn_flops"] == pytest.approx(0.0104, abs=5e-5)
    for key in ("paper_gflops_per_token", "flops_per_token", "parameters_per_token", "bytes_per_token", "bound"):
        assert set(found[key]) == {"dense", "sparse"}
    assert (found["model"], found["sparsity"], found["dtype"]) == (str(llama), 0.5, "bfloat16")
    assert (found["context"], found["expert_size"]) == (0, 32)


def test_the_model_needs_no_option(llama, cost):
    words = ("--sparsity", "0.5", "--json")
    assert cost(llama, *words).out == cost("--model", llama, *words).out


def test_the_table_shows_what_json_says(llama, cost):
    outcome = cost("--model", llama / "config.json", "--sparsity", 0.5)
    assert (outcome.code, outcome.err) == (0, "")
    assert "cost per token: bfloat16, context 1024, experts of 32" in outcome.out
    found = figures(cost("--model", llama, "--sparsity", 0.5, "--json"))
    assert cells(outcome.out, "GFLOPs as the paper counts") == ["12.0625", "8.1152", "1.49x"]
    flops, moved = found["flops_per_token"], found["bytes_per_token"]
    assert cells(outcome.out, "GFLOPs with scores and head")[:2] == [f"{flops[k] / 1e9:.4f}" for k in flops]
    assert cells(outcome.out, "MB moved")[:2] == [f"{moved[k] / 1e6:.3f}" for k in moved]
    assert cells(outcome.out, "speed-up bound, end to end")[-1] == f"{found['bound']['sparse']:.2f}x"
    assert cells(outcome.out, "speed-up bound, FFN blocks alone")[-1] == "1.96x"
    assert "Routers, included: 1.04 % of the dense FFNs" in outcome.out
    memory = found["training_memory"]
    assert (memory["precision"], memory["tokens"]) == ("bf16-mixed", 1024)
    totals = [f"{memory[key] / 2**30:.2f}" for key in ("total", "total_checkpointed")]
    assert cells(outcome.out, "total") == totals


def test_options_count(llama, cost):
    common = ("--model", llama, "--sparsity", 0.5, "--json")
    short = figures(cost(*common, "--context", 100))
    full = figures(cost(*common, "--context", 100, "--dtype", "fp32"))
    assert full["bytes_per_token"] == {key: 2 * value for key, value in short["bytes_per_token"].items()}
    long = figures(cost(*common, "--context", 200))
    scores = 32 * 4 * 4096 * 100
    assert long["flops_per_token"]["dense"] - short["flops_per_token"]["dense"] == scores
    assert long["paper_gflops_per_token"] == short["paper_gflops_per_token"]
    fine = figures(cost(*common, "--expert-size", 16))
    assert fine["router_share_of_ffn_flops"] == 2 * short["router_share_of_ffn_flops"]
    batch = figures(cost(*common, "--context", 100, "--batch-size", 3, "--precision", "bf16-true"))["training_memory"]
    assert (batch["tokens"], batch["precision"]) == (300, "bf16-true")
    assert batch["activations"] == 3 * short["training_memory"]["activations"]
    assert batch["gradients"] == short["training_memory"]["gradients"] / 2


def test_everything_off(llama, cost):
    found = figures(cost("--model", llama, "--sparsity", 1, "--json"))
    assert found["paper_gflops_per_token"]["sparse"] == pytest.approx(4.0840, abs=5e-5)
    assert found["ffn_bound"]["sparse"] == pytest.approx(1 / found["router_share_of_ffn_flops"], rel=1e-2)


def test_a_fit_s_model_is_charged_what_the_fit_measured(fitted, cost):
    found = figures(cost("--model", fitted.run / "model", "--json"))
    results = fitted.results
    assert found["sparsity_per_layer"] == results["sparsity_per_layer"]
    assert found["sparsity"] == pytest.approx(results["sparsity"])
    assert found["expert_size"] == 8
    assert found["paper_gflops_per_token"]["sparse"] * 2**30 == results["flops_per_token"]
    assert found["paper_gflops_per_token"]["dense"] * 2**30 == results["dense_flops_per_token"]
    assert found["bytes_per_token"] == {
        "dense": results["dense_bytes_per_token"],
        "sparse": results["bytes_per_token"],
    }
    assert found["bound"]["sparse"] == results["bound"]
    assert figures(cost("--model", fitted.run / "model", "--sparsity", 0.25, "--json"))["sparsity"] == 0.25


def test_a_fit_says_what_memory_it_expects(tiny, lightning, tmp_path, caplog):
    with caplog.at_level("INFO"):
        outcome = lightning(tmp_path, tiny.config(epochs=(1, 0, 0)), "fit")
    assert outcome.code == 0, outcome.err
    (line,) = (text for text in caplog.messages if text.startswith("expected memory per device: "))
    sizes = "weights 0.00, gradients 0.00, AdamW 0.00, activations 0.00"
    assert line.endswith(f" GiB ({sizes}); 32-true, at most 8 x 16 tokens")


def test_a_fit_on_several_devices(llama, cost):
    words = ("--devices", 8, "--batch-size", 4, "--context", 2048, "--texts", 100_001)
    found = figures(cost(llama, *words, "--json"))
    assert set(found) == {"model", "expert_size", "context", "fit"}  # no sparsity is known, and none is needed
    fit = found["fit"]
    assert (fit["devices"], fit["gpu"], fit["texts_per_step"], fit["tokens_per_device"]) == (8, "H100 SXM", 32, 8192)
    for strategy in ("ddp", "fsdp2"):
        assert set(fit[strategy]) == {"dense", "router", "expert"}
        for stage in fit[strategy].values():
            assert stage["hours"] == pytest.approx(3126 * stage["seconds_per_step"] / 3600)  # the last step is not full
            assert stage["seconds_per_step_checkpointed"] >= stage["seconds_per_step"]
    assert fit["ddp"]["dense"]["gradients"] == pytest.approx(8 * fit["fsdp2"]["dense"]["gradients"], rel=1e-6)
    outcome = cost(llama, *words)
    assert (outcome.code, outcome.err) == (0, "")
    for strategy in ("ddp", "fsdp2"):
        for stage, expected in fit[strategy].items():
            (row,) = (line for line in outcome.out.splitlines() if line.startswith(f"│ {strategy}") and stage in line)
            shown = [cell.strip() for cell in row.strip("│").split("│")][2:]
            sizes = ("weights", "gradients", "optimizer", "shared", "activations", "total", "total_checkpointed")
            assert shown[:7] == [f"{expected[name] / 2**30:.2f}" for name in sizes]
            assert shown[7:] == [f"{expected['seconds_per_step']:.3g}", f"{expected['hours']:.3g}"]
    assert "cost per token" not in outcome.out


def test_both_tables_where_a_sparsity_is_known(llama, cost, fitted):
    for words in ((llama, "--sparsity", 0.5), (fitted.run / "model",)):
        outcome = cost(*words, "--devices", 2, "--precision", "64-true")
        assert (outcome.code, outcome.err) == (0, "")
        assert "cost per token" in outcome.out
        assert "a fit on 2 x H100 SXM, 64-true" in outcome.out
        assert "│ fsdp2    │ router │" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--sparsity": 1.5}, "sparsity is 1.5; it is the share of neurons that do not run, from 0 to 1"),
        ({"--sparsity": -0.1}, "sparsity is -0.1"),
        ({"--sparsity": ".nan"}, "sparsity is nan"),
        ({"--sparsity": None}, "is a plain model; give --sparsity"),
        ({"--dtype": "int3"}, "unknown dtype 'int3'; there are bf16, bfloat16, fp16"),
        ({"--context": 4097}, "context is 4097; this llama takes 0 to 4096"),
        ({"--context": -1}, "context is -1"),
        ({"--expert-size": 30}, "expert_size=30 does not split 11008"),
        ({"--expert-size": 0}, "expert_size is 0"),
        ({"--batch-size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"--precision": "fp4"}, "unknown precision 'fp4'; there are 64-true, 32-true"),
        ({"--devices": 0}, "--devices is 0; it must be at least 1"),
        ({"--gpu": "H100 SXM"}, "--gpu H100 SXM is about a fit on several devices; add --devices N"),
        ({"--texts": 10}, "--texts 10 is about a fit on several devices"),
        ({"--devices": 2, "--gpu": "H100"}, "unknown GPU 'H100'; there are RTX 3090 Ti"),
        ({"--devices": 2, "--link": 0}, "--link is 0.0; it must be a bandwidth in GB/s"),
        ({"--devices": 2, "--link": ".nan"}, "--link is nan"),
        ({"--devices": 2, "--utilisation": 1.5}, "--utilisation is 1.5; it is the share of the GPU's peak"),
        ({"--devices": 2, "--texts": 0}, "--texts is 0; it must be at least 1"),
        ({"--devices": 2, "--context": 0}, "a fit has texts of at least one token"),
        ({"--devices": 2, "--precision": "fp4"}, "unknown precision 'fp4'; there are 64-true, 32-true"),
        ({"--model": "./nowhere"}, "no folder or file ./nowhere, and no model of that name"),
        ({"--model": "nobody/nothing"}, "no folder or file nobody/nothing, and no model of that name"),
        ({"--model": "empty"}, "empty has no config.json, so it is no Hugging Face model folder"),
        ({"--model": "albert"}, "model type 'albert' is not supported; known are"),
    ],
)
def test_bad_input(options, message, llama, cost, tmp_path):
    (tmp_path / "empty").mkdir()
    AlbertConfig().save_pretrained(tmp_path / "albert")
    wanted = {"--model": llama, "--sparsity": 0.5} | options
    outcome = cost(*(word for option, value in wanted.items() if value is not None for word in (option, value)))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_an_lte_model_that_was_never_measured(fitted, cost, tmp_path):
    folder = shutil.copytree(fitted.run / "model", tmp_path / "model")
    description = json.loads((folder / "lte_config.json").read_text()) | {"about": {}}
    (folder / "lte_config.json").write_text(json.dumps(description))
    outcome = cost("--model", folder)
    assert outcome.code == 1
    assert "lte_config.json of" in outcome.err
    assert "give --sparsity" in outcome.err


# The commands


def test_help_lists_every_command_in_one_line(lightning, tmp_path):
    outcome = lightning(tmp_path, None, "--help")
    assert outcome.code == 0
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^    {name} *(\n {{10,}})?{re.escape(summary)}$", outcome.out, re.MULTILINE), name


@pytest.mark.parametrize("module", sorted({module for module, _ in COMMANDS.values()}))
def test_every_command_has_a_main(module):
    assert callable(import_module(module).main)


@pytest.mark.parametrize("words", [["fitt"], ["--model", "x"]])
def test_a_command_that_is_not_there(words, lightning, tmp_path):
    outcome = lightning(tmp_path, None, *words)
    assert outcome.code == 2
    assert "error: " in outcome.err


def test_lightning_s_own_options_may_stand_first(tiny, lightning, tmp_path):
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": tiny.config()}))
    outcome = lightning(tmp_path, None, "--config", "all.yaml", "fit", "--print_config")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["data"]["init_args"]["task"] == "sst2"


def test_cost_starts_nothing_heavy(llama):
    code = (
        "import sys; from lte_lightning.cli import main; "
        f"main(['cost', '--model', {str(llama)!r}, '--sparsity', '0.5', '--json']); "
        "print([m for m in ('lightning', 'mlflow', 'datasets', 'torchmetrics') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (result.stdout.splitlines()[-1], result.returncode) == ("[]", 0), result.stderr


def test_a_packaged_model_has_the_name_that_fits_use(cost):
    found = figures(cost("--model", MODEL, "--sparsity", 0.8, "--json"))
    assert found["model"] == MODEL
    assert len(found["sparsity_per_layer"]) == 6

"""Every block of code in the README and on the site: shells run it with our commands recorded, then each is parsed.

A block without a language is for a shell. It runs in bash where the files that it names are. Stand-ins of the programs
write down how they were called, so quotes, variables, loops and pipes mean what they mean to a user. Then the command
itself parses each call of ours, and is told to print its configuration instead of running. Blocks of Python run whole.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import lte_lightning
from lte_lightning import LteConfig
from lte_lightning.cli import COMMANDS, main
from lte_lightning.sweep.spec import read_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("lightning", "lte")
LAUNCHERS = ("torchrun", "srun")  # which run one of ours, or its module
OTHERS = (*LAUNCHERS, "python", "python3", "pip", "nox", "mlflow", "tensorboard", "register-python-argcomplete")
STAND_IN = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
# What examples call the folder of a run, and the files that they name
RUNS = ("RUN", "DENSE_RUN", "reviews", "runs/sweep-NAME/0123")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHELL, PYTHON, YAML = "", "python", "yaml"


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def names(language: str) -> list[str]:
    """``page:number`` of each block."""
    return [f"{page.relative_to(ROOT)}:{i}" for page in PAGES for i in range(len(blocks(page, language)))]


def block(name: str, language: str) -> str:
    page, _, number = name.partition(":")
    return blocks(ROOT / page, language)[int(number)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what examples name, and the stand-ins in ``bin``."""
    place = tmp_path_factory.mktemp("examples")
    for folder in ("conf", "sweeps"):
        (place / folder).symlink_to(ROOT / folder)
    config = yaml.safe_load((ROOT / "conf" / "own-classifier.yaml").read_text())
    for run in RUNS:
        (place / run).mkdir(parents=True)
        (place / run / "config.yaml").write_text(yaml.safe_dump(config))
        (place / run / "results.json").write_text("{}")
    (sweep,) = blocks(ROOT / "docs" / "tutorials" / "compare.md", YAML)
    (place / "compare.yaml").write_text(sweep)
    for folder in ("bin", ".venv/bin"):
        (place / folder).mkdir(parents=True)
        for program in (*OURS, *OTHERS):
            file = place / folder / program
            file.write_text(STAND_IN.format(python=sys.executable))
            file.chmod(0o755)
    return place


def calls_of(code: str, place: Path) -> list[list[str]]:
    """How a block calls the programs; it must end well, and call nothing that the stand-ins do not know."""
    log = place / "calls.jsonl"
    log.unlink(missing_ok=True)
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "CALLS": str(log)}
    script = f"set -e -o pipefail\n{code}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), code
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", names(SHELL))
def test_what_a_shell_is_told_is_taken_by_the_commands(name, place, monkeypatch):
    calls = calls_of(block(name, SHELL), place)
    assert calls
    for program, *words in calls:
        if program in LAUNCHERS:
            program, *words = words[next(i for i, word in enumerate(words) if word in (*OURS, "lte_lightning")) :]
        if program == "python":
            assert find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file(), words
        elif program in (*OURS, "lte_lightning"):
            assert words[0] in COMMANDS, words
            assert takes(words, place, monkeypatch) == (0, ""), words


def takes(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """The exit code of a command that is told not to run, and what it says on standard error."""
    if words[0] == "sweep":
        words = [*words, "--dry-run"] if "--dry-run" not in words else words
    elif words[0] != "configs" and not any("help" in word for word in words):
        words = [*words, "--print_config"]
    monkeypatch.setattr(sys, "argv", ["lte", *words])
    said, code = io.StringIO(), 0
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, said.getvalue()


def test_an_example_that_is_wrong_is_found(place, monkeypatch):
    code = "lightning fit --config conf/quickstart.yaml --model.eficiency_weight 1  # as typed\n"
    ((_, *words),) = calls_of(code, place)
    exit_code, said = takes(words, place, monkeypatch)
    assert exit_code == 2
    assert "did you mean --model.efficiency_weight?" in said or "efficiency_weight" in said
    with pytest.raises(AssertionError):
        calls_of("lightnig fit\n", place)


# Python


@pytest.fixture
def bert(tmp_path):
    """A fine-tuned classifier and a batch, as the README has them."""
    BertForSequenceClassification(BertConfig(vocab_size=64, **TINY)).save_pretrained(tmp_path / "my-fine-tuned-bert")
    ids_BT = torch.randint(5, 64, (3, 7))
    return {
        "batch": {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": torch.tensor([0, 1, 0])}
    }


@pytest.fixture
def decoder(tmp_path, make_lm_tokenizer):
    """`decoder(folder)` saves a sparse language model with its tokenizer."""

    def make(folder):
        tokenizer = make_lm_tokenizer(pad_token="<pad>")
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TINY}
        model = LlamaForCausalLM(LlamaConfig(eos_token_id=tokenizer.eos_token_id, **sizes))
        model.generation_config.max_new_tokens = 3
        lte_lightning.convert(model, LteConfig(expert_size=16), progress=False)
        lte_lightning.set_mode(model, "hard")
        lte_lightning.save_pretrained(model, tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        return model

    return make


def run(name: str, cwd: Path, **known: object) -> dict[str, object]:
    """Runs a block of Python in a folder; returns its names."""
    with contextlib.chdir(cwd):
        exec(block(name, PYTHON), known)
    return known


def test_readme(bert, tmp_path):
    known = run("README.md:0", tmp_path, **bert)
    assert (tmp_path / "my-sparse-bert" / "lte_config.json").exists()
    assert known["loss"].isfinite()
    assert type(known["plain"]) is BertForSequenceClassification


def test_api(bert, tmp_path):
    assert lte_lightning.core.model.experts.expert_ffns(run("docs/api.md:0", tmp_path)["model"])


@pytest.mark.usefixtures("forgets_selectors")
def test_baselines(tmp_path, monkeypatch):
    """A ranking of a module of one's own, named by its path."""
    (tmp_path / "my_baselines.py").write_text(block("docs/baselines.md:0", PYTHON))
    monkeypatch.syspath_prepend(tmp_path)
    from lte_lightning.selection import import_selector

    import_selector("my_baselines.Loudest")
    config = LlamaConfig(vocab_size=64, **TINY)
    model = LlamaForCausalLM(config).eval()
    lte = LteConfig(expert_size=16, selector="my_baselines.Loudest", target_sparsity=0.5)
    lte_lightning.convert(model, lte, progress=False)
    lte_lightning.set_mode(model, "hard")
    assert model(torch.randint(5, 64, (2, 6))).logits.isfinite().all()


@pytest.mark.usefixtures("forgets_selectors")
def test_extend(tmp_path):
    run("docs/extend.md:0", tmp_path, __name__="my_baseline")
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **TINY)).eval()
    lte_lightning.convert(model, LteConfig(expert_size=16, selector="first", target_sparsity=0.5), progress=False)
    lte_lightning.set_mode(model, "hard")
    assert model(torch.randint(5, 64, (2, 6))).logits.isfinite().all()


def test_families(tmp_path):
    """A multimodal model of the name that the page has, tiny, where it is looked for first."""
    text = {"vocab_size": 64, "head_dim": 16, "num_key_value_heads": 1, **TINY}
    vision = {"image_size": 16, "patch_size": 8, **TINY}
    config = Gemma3ForConditionalGeneration.config_class(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "google/gemma-3-4b-pt")
    known = {"Gemma3ForConditionalGeneration": Gemma3ForConditionalGeneration, "Gemma3ForCausalLM": Gemma3ForCausalLM}
    run("docs/families.md:0", tmp_path, **known)
    model = Gemma3ForCausalLM.from_pretrained(tmp_path / "gemma-3-4b-text")
    lte_lightning.convert(model, LteConfig(expert_size=16), progress=False)


def test_huggingface(decoder, tmp_path):
    decoder("FOLDER")
    try:
        known = run("docs/huggingface.md:0", tmp_path)
    finally:
        lte_lightning.register(False)
    assert known["answer"]("cat", max_new_tokens=2)[0]["generated_text"].startswith("cat")


def test_sparsity(decoder, tmp_path):
    from lte_lightning.core.model.folder import read_description
    from lte_lightning.core.model.thresholds import write_table
    from lte_lightning.core.routing.knob import find_thresholds

    model = decoder("RUN/model")
    ids_BT = torch.randint(5, 64, (8, 8))
    batch = (lambda: model.base_model(input_ids=ids_BT), (torch.ones_like(ids_BT).bool(),))
    with torch.no_grad():
        table = find_thresholds(model, [batch], [0.4, 0.6])
    write_table(table, tmp_path / "RUN/model", read_description(tmp_path / "RUN/model"))
    assert run("docs/sparsity.md:0", tmp_path, lte_lightning=lte_lightning)["model"] is not None


def test_speed(decoder, tmp_path):
    decoder("my-sparse-model")
    run("docs/speed.md:0", tmp_path, lte_lightning=lte_lightning)
    assert (tmp_path / "my-sparse-model-int8" / "lte_config.json").exists()
    model = lte_lightning.from_pretrained(str(tmp_path / "my-sparse-model-int8"))
    inputs = {"input_ids": torch.randint(5, 64, (1, 4)), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    run("docs/speed.md:1", tmp_path, lte_lightning=lte_lightning, model=model, inputs=inputs)


# What needs the hub, other packages, or objects that other pages make. Line by line that is run by test_trainer.py,
# test_hub.py and test_quantize.py of tests/core/model, tests/export/test_graph.py and tests/cli/test_mlflow.py.
ELSEWHERE = ("docs/huggingface.md:1", "docs/export.md:0", "docs/export.md:1", "docs/speed.md:2", "docs/tracking.md:0")
# Run from the notebooks, in tests/cli/test_tutorials.py
TUTORIALS = (
    *("docs/tutorials/own-classifier.md:0", "docs/tutorials/own-classifier.md:1", "docs/tutorials/chat.md:0"),
    *("docs/tutorials/checkpoint.md:0", "docs/tutorials/devices.md:0"),
)


def test_every_block_of_python_is_run():
    run_here = set(re.findall(r'"((?:README|docs/[\w/-]+)\.md:\d)"', Path(__file__).read_text()))
    assert set(names(PYTHON)) == run_here


# YAML


def test_sweeps():
    """Blocks of the page as one would use them, in a file beside those of ``sweeps/``."""
    whole, search, measured = (yaml.safe_load(code) for code in blocks(ROOT / "docs" / "sweeps.md", YAML))
    file = ROOT / "sweeps" / f".example-{os.getpid()}.yaml"

    def read(content):
        file.write_text(yaml.safe_dump(content))
        try:
            return read_sweep(file)
        finally:
            file.unlink()

    assert {point.variant for point in read(whole).points()} == {None, "LTE", "LTE, random experts"}
    shared = {key: whole[key] for key in ("configs", "seeds", "start", "floor")}
    assert read(shared | search).search.trials == 30
    timed = {**search["search"], **measured["search"]}
    assert (
        read(shared | {"overrides": measured["overrides"], "search": timed}).search.objectives["speedup"] == "maximize"
    )


def test_every_block_of_yaml_is_read():
    assert {name.partition(":")[0] for name in names(YAML)} == {"docs/sweeps.md", "docs/tutorials/compare.md"}

"""The README and the documentation site: links lead somewhere, no page is lost, examples run."""

import contextlib
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification

from lte_lightning.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def text_of(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(path))
    lost = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert lost == []


def test_every_page_is_in_the_navigation_once():
    found = re.findall(r"[\w-]+\.md", str(SITE["nav"]))
    assert sorted(found) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_what_the_api_page_documents_is_there():
    named = re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(named) > 10
    assert [name for module, name in named if not hasattr(importlib.import_module(module), name)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_files_that_the_readme_shows_are_there():
    files = re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(files) == 8
    assert [file for file in files if not (ROOT / "lte_lightning" / file).is_file()] == []


def test_the_map_of_the_code_is_whole():
    named = set(re.findall(r"`(\w+)/", text_of(ROOT / "CONTRIBUTING.md")))
    folders = {path.parent.name for path in (ROOT / "lte_lightning").glob("*/__init__.py")}
    assert folders <= named


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_of_every_command_is_in_the_navigation(hooks):
    class Config:
        nav = SITE["nav"]

    (pages,) = [item["Commands"] for item in hooks.on_config(Config).nav if "Commands" in item]
    assert [list(page) for page in pages] == [[f"lte {name}"] for name in COMMANDS]


# Pages of validate, test and predict are made as that of fit is.
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("validate", "test", "predict")])
def test_the_page_of_a_command_has_its_options(command, hooks, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = hooks.page(command)
    assert page.startswith(f"# lte {command}\n")
    assert "usage: lte" in page
    option = {"fit": "--trainer.devices", "sweep": "--workers", "bench": "--sparsity", "harness": "--num_fewshot"}
    option |= {"generate": "--temperature"}
    assert option.get(command, "--help") in page
    if command == "fit":
        for shown in (
            "--model.help",
            "## `--model Classification`",
            "--model.efficiency_weight",
            "## `--data GlueData`",
        ):
            assert shown in page
    assert capsys.readouterr() == ("", "")


def test_the_readme_s_python_runs(tmp_path):
    (code,) = blocks(ROOT / "README.md")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "my-fine-tuned-bert")
    ids_BT = torch.randint(5, 64, (3, 7))
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": torch.tensor([0, 1, 0])}
    names = {"batch": batch}
    with contextlib.chdir(tmp_path):
        exec(code, names)
    assert (tmp_path / "my-sparse-bert" / "lte_config.json").exists()
    assert names["loss"].isfinite()
    assert type(names["plain"]) is BertForSequenceClassification


def test_the_baseline_of_the_documentation_runs():
    from lte_lightning import LteConfig, convert, set_mode
    from lte_lightning.selection import registry

    (code,) = blocks(ROOT / "docs" / "extend.md")
    try:
        exec(code, {"__name__": "my_baseline"})
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
        convert(model, LteConfig(expert_size=16, selector="first", target_sparsity=0.5), progress=False)
        set_mode(model, "hard")
        assert model(torch.randint(5, 64, (2, 6))).logits.isfinite().all()
    finally:
        registry._selectors.pop("first", None)

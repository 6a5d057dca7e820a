"""The README and the site: links lead somewhere, no page is lost. What examples say is tried by test_examples.py."""

import importlib
import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import lte_lightning
from lte_lightning.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def text_of(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(path))
    lost = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert lost == []


def test_every_page_is_in_the_navigation_once():
    named, docs = re.findall(r"[\w/-]+\.md", str(SITE["nav"])), ROOT / "docs"
    assert sorted(named) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_what_the_api_page_documents_is_there():
    named = re.findall(r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert {name for module, name in named if module == "lte_lightning"} == set(lte_lightning.__all__)
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


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return script("hooks")


def test_pictures_are_what_their_script_draws():
    for name, content in script("pictures").pictures().items():
        ElementTree.fromstring(content)
        assert (ROOT / "docs" / name).read_text() == content, f"python docs/pictures.py writes {name} anew"
        assert f"]({name})" in (ROOT / "docs" / "concepts.md").read_text()


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
    option = {"fit": "--trainer.devices", "sweep": "--workers", "bench": "--sparsity", "harness": "--num-fewshot"}
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


def test_contributing_lists_every_session():
    sessions = re.findall(
        r'^@nox\.session\((?:name="([\w-]+)")?.*\)\ndef (\w+)\(', (ROOT / "noxfile.py").read_text(), re.M
    )
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted({name or function for name, function in sessions} - {"env"}) == sorted(listed)

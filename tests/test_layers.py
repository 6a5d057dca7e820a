import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lte_lightning

PACKAGE = Path(lte_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports point down or sideways only. The API in lte_lightning/__init__.py stands on the core.
RANKS = {
    "errors": -1,
    "cache": -1,
    "lazy": -1,
    "kernels": 0,
    "selection": 1,
    "core": 2,
    "": 3,
    "store": 3,
    "results": 3,
    "shipped": 3,
    "data": 4,
    "tasks": 4,
    "callbacks": 4,
    "recording": 4,
    "bench": 4,
    "sweep": 5,
    "report": 5,
    "cli": 6,
    "__main__": 7,
}
LOW = ("errors", "cache", "lazy", "kernels", "selection", "core", "")
# What the low layers may import besides Python's own library.
ALLOWED = {"huggingface_hub", "lte_lightning", "numpy", "safetensors", "torch", "tqdm", "transformers", "triton"}


def part(dotted: str) -> str:
    """The layer of a module of ours: its name's second part, or "" for the package itself."""
    second = (*dotted.split("."), "")[1]
    return second if second in RANKS or (PACKAGE / second).is_dir() or (PACKAGE / f"{second}.py").exists() else ""


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def imports(source: str) -> Iterator[str]:
    """All imported names with their modules, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from lte_lightning import tasks` names a layer, too. Relative imports would escape the test.
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(layer: str, source: str) -> list[str]:
    """The imports in the source of a module of this layer that it must not have."""

    def allowed(module: str) -> bool:
        root = module.split(".")[0]
        if root == "lte_lightning":
            return RANKS[part(module)] <= RANKS[layer]
        return bool(root) and (layer not in LOW or root in sys.stdlib_module_names or root in ALLOWED)

    return [module for module in imports(source) if not allowed(module)]


def test_every_part_has_a_rank():
    parts = {own_part(path) for path in FILES}
    assert {"kernels", "selection", "core", "data", "tasks", "callbacks", "cli"} <= parts <= RANKS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert violations(own_part(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("layer", "source", "expected"),
    [
        ("core", "from lte_lightning.selection import Router", []),
        (
            "selection",
            "from lte_lightning.core.model.parts import find_row",
            ["lte_lightning.core.model.parts.find_row"],
        ),
        ("selection", "def f():\n    import lte_lightning.tasks.base", ["lte_lightning.tasks.base"]),
        ("core", "from lte_lightning import tasks", ["lte_lightning.tasks"]),
        ("core", "from lte_lightning import convert", ["lte_lightning.convert"]),
        ("core", "from ..tasks import base", ["..tasks.base"]),
        ("kernels", "import torch, lightning.pytorch", ["lightning.pytorch"]),
        ("core", "from datasets import load_dataset", ["datasets.load_dataset"]),
        ("tasks", "from lte_lightning.cli import main", ["lte_lightning.cli.main"]),
        ("tasks", "import torchmetrics", []),
        ("cli", "from lte_lightning.tasks.base import LteModule", []),
    ],
)
def test_the_rule_itself(layer, source, expected):
    assert violations(layer, source) == expected


SELECTION = PACKAGE / "selection"
# What the rest may know of selectors: the protocol and the registry, and no class of one
PROTOCOL = {
    "Activity",
    "Description",
    "Ffn",
    "FfnShape",
    "ModelShape",
    "SELECTORS",
    "Selector",
    "import_selector",
    "register_selector",
    "selector_class",
    "selector_names",
}


def asks_for_a_class(source: str) -> list[str]:
    """Where a source outside of selection/ asks which class a selector is, or may: imports, and tests of types."""
    found, tree = [], ast.parse(source)
    # type(x).__name__ is for messages
    named = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "__name__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lte_lightning.selection"):
            deep = node.module != "lte_lightning.selection"
            found += [alias.name for alias in node.names if deep or alias.name not in PROTOCOL]
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("lte_lightning.selection")]
        if (
            id(node) not in named
            and isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type")
        ):
            # of an attribute or a variable that holds a selector, or against the base class
            words = {getattr(inner, "attr", getattr(inner, "id", "")) for inner in ast.walk(node)}
            found += [ast.unparse(node)] * bool(words & {"selector", "selectors", "Selector", "selector_class"})
    return found


@pytest.mark.parametrize(
    "path", [path for path in FILES if SELECTION not in path.parents], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_outside_asks_which_class_a_selector_is(path):
    assert asks_for_a_class(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from lte_lightning.selection import Selector, selector_class", []),
        ("from lte_lightning.selection import Router", ["Router"]),
        ("from lte_lightning.selection.wanda import Wanda", ["Wanda"]),
        ("isinstance(ffn.selector, Gates | Router)", ["isinstance(ffn.selector, Gates | Router)"]),
        ("isinstance(x, Selector)", ["isinstance(x, Selector)"]),
        ("type(selector) is Router", ["type(selector)"]),
        ("type(ffn.selector).__name__", []),
        ("isinstance(batch, dict)", []),
    ],
)
def test_that_rule_itself(source, expected):
    assert asks_for_a_class(source) == expected

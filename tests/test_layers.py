import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lte_lightning

PACKAGE = Path(lte_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The layers from the ground up. A file imports from its own layer and from those before it.
ORDER = (
    ("errors", "lazy"),
    ("bars", "cache", "files"),
    ("kernels",),
    ("selection",),
    ("core", "core.model"),
    ("core.routing",),
    ("core.accounting",),
    ("",),  # the API in lte_lightning/__init__.py
    ("documents", "network", "options", "quiet", "shipped", "store", "trainer"),
    ("results",),
    ("choices",),
    ("data",),
    ("tasks",),
    ("callbacks",),
    ("export",),
    ("bench",),
    ("recording",),
    ("sweep",),
    ("report",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Those that may import these alone, besides Python's own library.
LOW = (
    "bars",
    "cache",
    "errors",
    "files",
    "lazy",
    "kernels",
    "selection",
    "core",
    "core.model",
    "core.routing",
    "core.accounting",
    "",
)
ALLOWED = {"huggingface_hub", "lte_lightning", "numpy", "safetensors", "torch", "tqdm", "transformers", "triton"}


def part(dotted: str) -> str:
    """The layer of a module of ours: its name's second part, of core the third too, or "" for the package itself."""
    _, *names = dotted.split(".")
    for count in (2, 1):
        if (name := ".".join(names[:count])) in RANKS:
            return name
    is_ours = names and ((PACKAGE / names[0]).is_dir() or (PACKAGE / f"{names[0]}.py").exists())
    return names[0] if is_ours else ""


def own_part(path: Path) -> str:
    return part(module_name(path))


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("lte_lightning", *(name for name in names if name != "__init__")))


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
    assert {"kernels", "selection", "core.model", "data", "tasks", "callbacks", "cli"} <= parts <= RANKS.keys()


def imported_files(name: str, source: str, modules: dict[str, str]) -> set[str]:
    """The modules of ours that a source imports, wherever in it and even if only for its types."""
    found = set()
    for dotted in imports(source):
        parent = dotted.rpartition(".")[0]
        found |= {next((module for module in (dotted, parent) if module in modules), name)}
    return found - {name}


def circles(modules: dict[str, str]) -> set[frozenset[str]]:
    """The largest sets of modules, given by name and source, in which each imports each, maybe by way of others."""
    graph = {name: imported_files(name, source, modules) for name, source in modules.items()}
    reached: dict[str, set[str]] = {}
    for name in graph:
        reached[name], todo = set(), [name]
        while todo:
            fresh = graph[todo.pop()] - reached[name]
            reached[name] |= fresh
            todo += fresh
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}


def test_no_files_import_each_other():
    modules = {module_name(path): path.read_text() for path in FILES}
    assert [sorted(circle) for circle in circles(modules)] == []


def test_files_that_import_each_other_are_found():
    modules = {
        "p.a": "from p.b import f",
        "p.b": "def f():\n    import p.c",
        "p.c": "if TYPE_CHECKING:\n    from p import a",
        "p.d": "from p.a import x\nfrom p.e import y",
        "p.e": "import p.d, os",
        "p.f": "import p.a",
        "p": "",
    }
    assert circles(modules) == {frozenset({"p.a", "p.b", "p.c"}), frozenset({"p.d", "p.e"})}
    assert circles({"p": "from p.a import A", "p.a": "import p"}) == {frozenset({"p", "p.a"})}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert violations(own_part(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("layer", "source", "expected"),
    [
        ("core.model", "from lte_lightning.selection import Router", []),
        ("core.routing", "from lte_lightning.core.model.parts import find_parts", []),
        ("core.model", "from lte_lightning.core.routing import trace", ["lte_lightning.core.routing.trace"]),
        ("core.routing", "import lte_lightning.core.accounting.cost", ["lte_lightning.core.accounting.cost"]),
        ("callbacks", "from lte_lightning.recording.tables import show", ["lte_lightning.recording.tables.show"]),
        ("recording", "from lte_lightning.callbacks.plan import StagePlan", []),
        ("tasks", "from lte_lightning.callbacks import StagePlan", ["lte_lightning.callbacks.StagePlan"]),
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

"""Changes one operator or number of the package at a time, and runs the tests that should notice: `nox -s mutants`.

A mutant that no test notices survives: its line is printed, and either a test is missing or the change means nothing.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A file of the package, and the tests that should notice what happens to it
TARGETS = {
    "core/routing/losses.py": ["core/routing/test_losses.py"],
    "core/routing/trace.py": ["core/routing/test_trace.py", "core/routing/test_union.py"],
    "core/model/grouping.py": ["core/model/test_grouping.py"],
    "core/model/storage.py": ["core/model/test_storage.py", "core/model/test_skipping.py"],
    "core/model/loading.py": [
        *(f"core/model/test_{name}.py" for name in ("loading", "damage", "register", "quantize")),
        "core/routing/test_knob.py",
    ],
    "core/model/digest.py": ["core/model/test_damage.py"],
    "documents.py": ["test_documents.py", "cli/test_guard.py"],
    "files.py": ["test_store.py"],
}
OTHER = {
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yields what was changed, and the whole source with that change."""
    count = sum(1 for _ in _places(ast.parse(source)))
    for number in range(count):
        tree = ast.parse(source)
        node, change = list(_places(tree))[number]
        before = ast.unparse(node)
        change()
        yield f"line {node.lineno}: {before}  ->  {ast.unparse(node)}", ast.unparse(tree)


def _places(tree: ast.AST) -> Iterator[tuple[ast.expr, object]]:
    for node in ast.walk(tree):
        match node:
            case ast.Compare(ops=[op]) if type(op) in OTHER:
                yield node, lambda node=node, op=op: node.ops.__setitem__(0, OTHER[type(op)]())
            case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
                yield node, lambda node=node, op=op: setattr(node, "op", OTHER[type(op)]())
            case ast.Constant(value=bool() as value):
                yield node, lambda node=node, value=value: setattr(node, "value", not value)
            case ast.Constant(value=int() | float() as value):
                yield node, lambda node=node, value=value: setattr(node, "value", value + 1)


def survives(target: str, source: str, seconds: float) -> bool:
    """Says whether the tests of a file pass although it has this source."""
    with tempfile.TemporaryDirectory(prefix="lte-mutant-") as place:
        package = Path(shutil.copytree(ROOT / "lte_lightning", Path(place, "lte_lightning")))
        (package / target).write_text(source)
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        words += [str(ROOT / "tests" / test) for test in TARGETS[target]]
        environment = os.environ | {"PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:  # an endless loop is noticed
            return False
        return done.returncode == 0


def main() -> int:
    """Tries some mutants of each file; exit code 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", choices=[*TARGETS, []], help="files of the package (default: all)")
    parser.add_argument("--count", type=int, default=20, help="mutants of each file, drawn from all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="the longest that the tests of one may take")
    options = parser.parse_args()
    left = 0
    for target in options.files or TARGETS:
        found = list(mutants((ROOT / "lte_lightning" / target).read_text()))
        drawn = random.Random(options.seed).sample(found, min(options.count, len(found)))
        alive = [about for about, source in drawn if survives(target, source, options.seconds)]
        left += len(alive)
        print(f"{target}: {len(drawn)} of {len(found)} mutants tried, {len(alive)} survived", flush=True)
        for about in alive:
            print(f"  {about}", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""The smoke sweep, run once with two seeds by the version before points were data: it is read as that version did.

`python tests/frozen/test_frozen.py` writes what is expected anew.
"""

import contextlib
import io
import json
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lte_lightning.cli import main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SWEEP = ["sweep", "sweeps/smoke.yaml", "--seeds", "0,1"]


def thaw(cwd: Path) -> Path:
    """Lays the sweep's folder, its file and its configuration out below a folder; returns the first.

    That version knew the configuration by its bytes, so quickstart.yaml and smoke.yaml are here as they were then.
    """
    folder = cwd / "runs" / "sweep-smoke"
    for name, content in json.loads((HERE / "smoke.json").read_text()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    for name, place in (("smoke.yaml", "sweeps"), ("quickstart.yaml", "conf")):
        (cwd / place).mkdir()
        shutil.copy(HERE / name, cwd / place)
    return folder


def said(cwd: Path, *words: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
        main(list(words))
    return out.getvalue()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = tag == "style"

    def handle_data(self, data: str) -> None:
        if data.strip() and not self.hidden:
            self.lines.append(" ".join(data.split()))


def cells(page: Path) -> str:
    """All that a report says: its sentences and cells, one a line, but for where and when it was written."""
    parser = _Text()
    parser.feed(page.read_text())
    return "\n".join(parser.lines).partition("Versions and machine that wrote")[0]


def page(cwd: Path) -> str:
    said(cwd, "report", "runs/sweep-smoke", "--out", "page")
    return cells(cwd / "page" / "index.html")


def tables(cwd: Path) -> str:
    """The tables of the sweep, started again: all of it is done."""
    out = said(cwd, *SWEEP, "--trainer.logger", "false")
    assert "8 of 8 points are done already." in out
    folder = cwd / "runs" / "sweep-smoke"
    return (folder / "table.csv").read_text() + "\n" + (folder / "table.md").read_text()


def dry_run(cwd: Path) -> str:
    """The commands of the sweep in a folder of its own, and in the one that is done."""
    return said(cwd, *SWEEP, "--dry-run", "--folder", "runs/other") + "\n" + said(cwd, *SWEEP, "--dry-run")


FOUND = {"page.txt": page, "tables.txt": tables, "dry-run.txt": dry_run}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FOUND)
def test_a_frozen_sweep_reads_as_before(name, tmp_path):
    folder = thaw(tmp_path)
    before = {file: file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert FOUND[name](tmp_path) == (HERE / name).read_text()
    # what a sweep remembers may grow; of its runs nothing changes
    assert all(file.exists() for file in before)
    runs = {file: text for file, text in before.items() if file.parent not in (folder, folder / "points")}
    assert {file: file.read_text() for file in runs} == runs


if __name__ == "__main__":
    for name, find in FOUND.items():
        with tempfile.TemporaryDirectory() as cwd:
            thaw(Path(cwd))
            (HERE / name).write_text(find(Path(cwd)))

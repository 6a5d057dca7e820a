"""Completion in the shell: what argcomplete's script is given."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete", reason="the extra completion is not installed")


@pytest.fixture
def completions(tmp_path):
    """`completions(line)`: what may follow a line that is being typed."""

    def ask(line):
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found"), "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "lte_lightning"]
        done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        return [word.strip() for word in (tmp_path / "found").read_text().split("|")]

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lte cos", ["cost"]),
        ("lte cost --spar", ["--sparsity"]),
        ("lightning fit --trainer.max_ep", ["--trainer.max_epochs"]),
        ("lte push --priv", ["--private"]),
    ],
)
def test_commands_and_their_options_are_completed(line, expected, completions):
    assert completions(line) == expected

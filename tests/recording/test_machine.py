"""Where a figure comes from: machine, commit and code."""

import shutil
import subprocess

import pytest
import torch

import lte_lightning
from lte_lightning.recording.machine import PACKAGE, code, machine


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def package(tmp_path):
    """A package at the top of a folder."""
    folder = tmp_path / "project" / "lte_lightning"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("A = 1\n")
    return folder


def test_the_code_is_known_by_its_files(package):
    first = code(package)
    assert first["commit"] is None
    (package / "notes.txt").write_text("no code")
    assert code(package) == first
    (package / "__init__.py").write_text("A = 2\n")
    changed = code(package)["code"]
    assert changed != first["code"]
    (package / "__init__.py").rename(package / "other.py")
    assert code(package)["code"] not in (changed, first["code"])
    assert str(PACKAGE / "__init__.py") == lte_lightning.__file__


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_its_own_repository(package, tmp_path):
    """Not of one around a virtual environment that it was installed into, tracked or not."""
    project = package.parent
    git(project, "init")
    assert code(package)["commit"] is None  # nobody has added it
    git(project, "add", ".")
    git(project, "commit", "-m", "first")
    head = git(project, "rev-parse", "--short=12", "HEAD").strip()
    assert code(package)["commit"] == head
    (package / "__init__.py").write_text("A = 3\n")
    assert code(package)["commit"] == f"{head}-dirty"
    inner = project / "venv" / "site-packages" / "lte_lightning"
    inner.mkdir(parents=True)
    shutil.copy(package / "__init__.py", inner)
    git(project, "add", ".")
    git(project, "commit", "-m", "second")
    assert code(inner) == {"commit": None, "code": code(package)["code"]}


def test_the_machine_is_known_by_its_parts():
    found = machine(torch.device("cpu"))
    assert found.keys() == {"cpu", "gpu", "cores", "memory_gib"}
    assert found["gpu"] is None
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0.1

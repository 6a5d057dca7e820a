"""What starts without what: the modules that are loaded say it, no clock does."""

import importlib
import json
import subprocess
import sys

import pytest

from lte_lightning.cli import COMMANDS, TRAINING, main
from lte_lightning.cli.help import show_help

HEAVY = ("datasets", "jsonargparse", "lightning", "matplotlib", "mlflow", "torch", "torchmetrics", "transformers")
LAZY = ("lte_lightning", "lte_lightning.callbacks", "lte_lightning.data", "lte_lightning.tasks")


def loaded_by(code: str) -> list[str]:
    """Which of HEAVY are loaded once the code has run in a process of its own."""
    report = f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_imports_nothing_heavy():
    assert loaded_by("import lte_lightning, lte_lightning.tasks, lte_lightning.data, lte_lightning.callbacks") == []


def test_the_api_needs_no_lightning():
    loaded = loaded_by("import lte_lightning\nfor name in lte_lightning.__all__: getattr(lte_lightning, name)")
    assert loaded == ["torch", "transformers"]


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_the_list_of_commands_reads_no_torch(words):
    code = f"from lte_lightning.cli import main\ntry: main([{words!r}])\nexcept SystemExit: pass"
    assert loaded_by(code) == []


@pytest.mark.parametrize("package", LAZY)
def test_a_lazy_package_offers_what_it_says(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        assert vars(module)[name] is value  # found without a second search
    with pytest.raises(AttributeError, match=f"module {package!r} has no attribute 'convertt'"):
        module.convertt  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'convertt'"):
        exec(f"from {package} import convertt")


def test_a_help_text_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    made, program_before = [], sys.argv[0]

    def make():
        made.append(1)
        print("usage: ä")
        sys.exit(0)

    for _ in range(2):
        show_help("fit", make)
    assert (made, capsys.readouterr().out) == ([1], "usage: ä\n" * 2)
    show_help("test", make)  # another command's
    monkeypatch.setenv("COLUMNS", "77")  # another width
    show_help("fit", make)
    monkeypatch.setattr(sys, "argv", ["lightning"])  # another name
    show_help("fit", make)
    assert len(made) == 4
    for program, columns in (("lightning", "77"), (program_before, "77"), (program_before, "80")):  # all are kept
        monkeypatch.setattr(sys, "argv", [program])
        monkeypatch.setenv("COLUMNS", columns)
        show_help("fit", make)
    assert len(made) == 4
    assert sorted(path.name for path in (tmp_path / "lte-lightning").iterdir()) == ["help-fit.txt", "help-test.txt"]


def test_a_help_text_without_a_place_to_keep_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        show_help("fit", lambda: print("usage"))
    assert capsys.readouterr().out == "usage\n" * 2


def test_a_damaged_help_text_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lte-lightning").mkdir()
    (tmp_path / "lte-lightning" / "help-fit.txt").write_text("")
    show_help("fit", lambda: print("usage"))
    assert capsys.readouterr().out == "usage\n"


def test_a_failure_is_no_help_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        show_help("fit", lambda: sys.exit(2))
    assert not list(tmp_path.rglob("*.txt"))


# Those of validate, test and predict are made as that of fit is.
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("validate", "test", "predict")])
def test_every_command_has_help_that_is_kept(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lte", command, "--help"])
    main()
    first = capsys.readouterr()
    assert first.out.startswith("usage: lte")
    monkeypatch.setitem(COMMANDS, command, ("no.module", ""))  # it is not imported again
    main()
    assert capsys.readouterr().out == first.out
    if COMMANDS[command][0] == TRAINING:
        assert "--trainer.devices" in first.out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, "lte-lightning 0.1.0\n")

"""The options of the commands that are one typed function, and how their words are read."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lte_lightning.cli import main
from lte_lightning.options import call

# A renamed option breaks scripts: change these only with an entry in the changelog.
OPTIONS = {
    "bench": {
        "shape": "llama2-7b",
        "scope": "ffn,model",
        "against": None,
        "dtype": None,
        "tokens": "1",
        "sparsity": None,
        "backend": "auto",
        "device": "auto",
        "threads": None,
        "layers": None,
        "repeats": 11,
        "clock": "wall",
        "rivals": False,
        "ways": None,
        "new_tokens": 64,
        "data": None,
        "csv": None,
        "picture": None,
        "mlflow": None,
    },
    "build-kernels": {"out": None, "instructions": "auto"},
    "calibrate": {
        "folder": "FOLDER",
        "sparsity": "0.3,0.4,0.5,0.6,0.7,0.8,0.9",
        "layers": "free",
        "data": None,
        "tokens": 8192,
        "device": "auto",
    },
    "cost": {
        "model": "FOLDER",
        "sparsity": None,
        "dtype": "bf16",
        "context": None,
        "expert_size": None,
        "batch_size": 1,
        "precision": "bf16-mixed",
        "devices": None,
        "gpu": None,
        "link": None,
        "utilisation": None,
        "texts": None,
        "json": False,
    },
    "curve": {
        "folder": "FOLDER",
        "sparsity": None,
        "data": None,
        "out": "curve.png",
        "rows": 1,
        "device": "auto",
    },
    "generate": {
        "folder": "FOLDER",
        "prompt": "-",
        "max_new_tokens": 128,
        "temperature": 0.0,
        "backend": "auto",
        "dtype": "auto",
        "quantize": None,
        "device": "auto",
        "chat": False,
        "dense": False,
        "sparsity": None,
        "threads": None,
    },
    "harness": {
        "model": "FOLDER",
        "tasks": ["piqa"],
        "num_fewshot": None,
        "limit": None,
        "batch_size": 1,
        "include": None,
        "out": None,
        "json": False,
    },
    "export": {"folder": "FOLDER", "to": "gguf", "out": None, "dtype": "auto"},
    "push": {
        "folder": "FOLDER",
        "repository": "OWNER/NAME",
        "private": False,
        "revision": None,
        "message": "Upload model",
        "pull_request": False,
        "cache": None,
    },
    "sweep": {
        "sweep": "FILE",
        "folder": None,
        "workers": None,
        "seeds": None,
        "only": [],
        "dry_run": False,
        "ray_address": None,
        "cpus": 1,
        "gpus": 0.0,
    },
}
REQUIRED = {
    "bench": [],
    "build-kernels": [],
    "calibrate": ["FOLDER"],
    "cost": ["--model", "FOLDER"],
    "curve": ["FOLDER"],
    "generate": ["FOLDER"],
    "export": ["FOLDER", "--to", "gguf"],
    "harness": ["--model", "FOLDER", "--tasks", "piqa"],
    "push": ["FOLDER", "OWNER/NAME"],
    "sweep": ["FILE"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_these(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, *REQUIRED[command], "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0
    assert config == OPTIONS[command]
    assert list(config) == list(OPTIONS[command])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--sparsty", "0.5"], "unknown option --sparsty; did you mean --sparsity?"),
        (["bench", "--spars", "0.5"], "unknown option --spars"),  # no abbreviations
        (["bench", "--threads", "two"], "Given value: two"),
        (["bench", "llama2-7b", "extra"], "unknown option extra"),
        (["cost"], "the following arguments are required: model"),
        (["cost", "--model", "x", "--batchsize", "2"], "unknown option --batchsize; did you mean --batch-size?"),
        (["cost", "--model", "x", "--json", "maybe"], "error: "),
        (["cost", "x", "y"], "unknown option y"),
        (["generate", "x", "--folder", "y"], "unknown option x"),
        (["push", "x", "a/b", "y"], "unknown option y"),
        (["push", "x"], "the following arguments are required: repository"),
        (["push", "--folder", "x", "a/b", "y"], "unknown option y"),
        (["generate"], "the following arguments are required: folder"),
        (["generate", "x", "--prompt", "two", "words"], "unknown option words"),
        (["generate", "x", "--temperature", "hot"], "Got value: hot"),
        (["sweep", "x.yaml", "--worker", "2"], "unknown option --worker; did you mean --workers?"),
        (["sweep", "x.yaml", "y.yaml"], "unknown option y.yaml"),
        (["sweep"], "the following arguments are required: sweep"),
        (["harness", "--model", "x"], "the following arguments are required: tasks"),
        (["harness", "--model", "x", "--tasks"], "error: "),
    ],
)
def test_a_wrong_option(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert message in printed.err
    assert printed.err.endswith(f"see lte {words[0]} --help\n")


def takes(batch_size: int = 1, quick: bool = False, names: list[str] | None = None, out: Path | None = None) -> tuple:
    """Takes options."""
    return batch_size, quick, names, out


def places(folder: str, text: str = "-") -> tuple:
    """Places options."""
    return folder, text


def sends(folder: str, place: str, files: list[str], quick: bool = False) -> tuple:
    """Sends options."""
    return folder, place, files, quick


def wants(names: list[str], quick: bool = False) -> tuple:
    """Wants options."""
    return names, quick


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (1, False, None, None)),
        ("--batch-size 3", (3, False, None, None)),
        ("--batch_size=3 --quick", (3, True, None, None)),
        ("--quick false --out a/b-c", (1, False, None, Path("a/b-c"))),
        ("--quick --batch-size=2", (2, True, None, None)),
    ],
)
def test_words(words, expected):
    assert call(takes, "lte takes", words.split()) == expected


@pytest.mark.parametrize("text", ["null", "-", "", "1", "{a: [b]}", "-x", "a=b", "two\nlines"])
def test_a_word_without_an_option_and_text_as_it_is(text):
    for words in (["f", "--text", text], ["--text", text, "f"], ["--folder", "f", f"--text={text}"]):
        assert call(places, "lte places", words, positional="folder") == ("f", text)


@pytest.mark.parametrize(
    "words",
    ["a b c d --quick", "--quick a b c d", "a --place b c --quick d", "--place=b a c d --quick", "b --folder a c d"],
)
def test_words_of_several_places(words):
    quick = "--quick" in words
    assert call(sends, "lte sends", words.split(), positional=("folder", "place", "files")) == (
        "a",
        "b",
        ["c", "d"],
        quick,
    )


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_of_a_command_with_such_a_word(word, capsys):
    with pytest.raises(SystemExit) as stop:
        call(places, "lte places", [word], positional="folder")
    assert stop.value.code == 0
    assert "Places options." in capsys.readouterr().out


def gathers(out: str, runs: list[str] = [], quick_look: bool = False) -> tuple:  # noqa: B006
    """Gathers options.

    Args:
        out: The folder.
        runs: The runs.
        quick_look: The first ones.
    """
    return out, runs, quick_look


@pytest.mark.parametrize(
    ("function", "positional", "usage"),
    [
        (gathers, {"runs": "RUN"}, "usage: lte it [RUN ...] --out OUT [options]"),
        (places, "folder", "usage: lte it FOLDER [options]"),
        (places, ("folder", "text"), "usage: lte it FOLDER [TEXT] [options]"),
        (sends, ("folder", "place", "files"), "usage: lte it FOLDER PLACE FILES [FILES ...] [options]"),
        (takes, (), "usage: lte it [options]"),
    ],
)
def test_the_help_names_positional_arguments(function, positional, usage, capsys):
    with pytest.raises(SystemExit):
        call(function, "lte it", ["--help"], positional=positional)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == usage
    assert [name for name in ("--folder", "--place", "--files", "--runs") if name in printed] == []
    assert ("positional arguments" in printed) == bool(positional)


def test_the_help_spells_options_with_dashes(capsys):
    with pytest.raises(SystemExit):
        call(gathers, "lte it", ["--help"], positional={"runs": "RUN"})
    printed = " ".join(capsys.readouterr().out.split())
    assert "--out OUT The folder. (required, type: str)" in printed
    assert "--quick-look {true,false} The first ones." in printed
    assert "RUN The runs. (type: list[str], default: [])" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--names a", (["a"], False)),
        ("--names a,b c --quick", (["a,b", "c"], True)),
        ("--quick --names null 1", (["null", "1"], True)),
    ],
)
def test_lists(words, expected):
    assert call(wants, "lte wants", words.split()) == expected


def test_a_configuration_file(tmp_path):
    (tmp_path / "a.yaml").write_text("batch_size: 7\nout: x\n")
    assert call(takes, "lte takes", ["--config", str(tmp_path / "a.yaml"), "--quick"]) == (7, True, None, Path("x"))


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = subprocess.Popen(
        [sys.executable, "-m", "lte_lightning", "configs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 141
    command.stderr.close()

"""The two commands of the README exist, are one `&&` chain each, and name only what is there.

As a script (`python3 tests/test_readme.py tests`, standard library only) it prints a command: .ci/run gets its own so.
"""

import re
import shlex
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme_command(name: str) -> str:
    """The content of the fenced block after the comment `<!-- ci:name -->`."""
    found = re.findall(
        rf"^<!-- ci:{name} -->\s*^```\w*\n(.*?)\n```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    if len(found) != 1:
        raise LookupError(f"README.md has {len(found)} fenced blocks after <!-- ci:{name} -->, expected one")
    return found[0]


def chain(name: str) -> list[list[str]]:
    """The words of each command of a block, which has to be a single `&&` chain."""
    lexer = shlex.shlex(readme_command(name).replace("\\\n", " "), posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            commands.append([])
        else:
            assert not set(word) & set(";&|<>()\n"), f"{name}: {word!r} is not part of a single && chain"
            commands[-1].append(word)
    assert all(commands), f"{name}: an empty command in the chain"
    return commands


def check_what_it_names(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    for command in chain(name):
        for before, word in zip(["", *command], command, strict=False):
            if re.search(r"\.(yaml|txt|toml|py|csv|json|jsonl)$", word):
                assert (ROOT / word).is_file(), f"{name}: no file {word}"
            if extras := re.fullmatch(r"\.\[([\w,-]+)\]", word):
                assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), (
                    f"{name}: unknown extra in {word}"
                )
            if before == "-s":
                assert word in sessions, f"{name}: no nox session {word}"
        program = Path(command[0]).name
        assert program in {"python3", "pip", "nox", *project["scripts"]}, f"{name}: where does {program} come from?"


def test_tests_command_is_one_chain_of_existing_things():
    check_what_it_names("tests")
    assert [Path(command[0]).name for command in chain("tests")][-1] == "nox"


def test_quickstart_command_is_one_chain_of_existing_things():
    check_what_it_names("quickstart")
    assert chain("quickstart")[-1][1:3] == ["fit", "--config"]


if __name__ == "__main__":
    print(readme_command(sys.argv[1]))

"""The command line, called ``lte`` and ``lightning``: which command lives where."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from importlib import import_module
from typing import NoReturn

from lte_lightning import __version__
from lte_lightning.cli.complete import TRAINING, complete, completion_requested
from lte_lightning.cli.help import show_help
from lte_lightning.errors import UserError

# Name: module, help. The module's main(arguments) runs the command. It is imported for its own command alone, so that
# commands without training start without Lightning.
COMMANDS = {
    "fit": (TRAINING, "train a model through the stages: dense, router, expert"),
    "validate": (TRAINING, "measure a model on the validation rows, as a fit does"),
    "test": (TRAINING, "measure a routed model: metric, sparsity, cost per token"),
    "predict": (TRAINING, "write a model's predictions, one row per example"),
    "sync": ("lte_lightning.cli.sync", "send records to MLflow that failed to upload during a fit"),
    "sweep": ("lte_lightning.cli.sweep", "run many fits: a grid, a list or a search, over several seeds"),
    "report": ("lte_lightning.cli.report", "draw a page of what sweeps and runs found"),
    "generate": ("lte_lightning.cli.generate", "let a language model write, and see its speed and sparsity"),
    "calibrate": ("lte_lightning.cli.calibrate", "store thresholds, to choose the sparsity at inference"),
    "context": ("lte_lightning.cli.context", "measure copying and retrieval in long contexts"),
    "curve": ("lte_lightning.cli.curve", "draw a calibrated model's quality and speed"),
    "bench": ("lte_lightning.cli.bench", "time FFNs and models with experts skipped, against dense"),
    "cost": ("lte_lightning.cli.cost", "FLOPs, bytes and speed-up bound of a model at a sparsity"),
    "init": ("lte_lightning.cli.init", "write a configuration for your own data"),
    "configs": ("lte_lightning.cli.configs", "list the configurations and sweeps that come with the package"),
    "export": ("lte_lightning.cli.export", "write a saved model for other programs: GGUF, ONNX, OpenVINO"),
    "push": ("lte_lightning.cli.push", "upload a saved model and its card to the Hugging Face hub"),
    "build-kernels": ("lte_lightning.cli.build_kernels", "compile the CPU kernels before they are needed"),
    "harness": ("lte_lightning.cli.harness", "evaluate a saved model on tasks of the lm-evaluation-harness"),
}


def main(args: list[str] | None = None) -> None:
    """Runs the command line; an error that the user can put right is one message and exit code 1."""
    try:
        _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before or outside training; Lightning itself ends a fit
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `lte configs | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        refuse(
            UserError(f"{str(error.filename)[:60]}... has {len(str(error.filename))} letters: no file may be named so")
        )


def _run(args: list[str] | None) -> None:
    words = sys.argv[1:] if args is None else args
    if args is None and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before the first import of tqdm: no library's bars in a log
    if completion_requested() and args is None:
        return complete(_parser(), {name: module for name, (module, _) in COMMANDS.items()}, _run, _help_of)
    # Lightning's own options may stand before its command: `lightning --config all.yaml fit`
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        return import_module(TRAINING).main(args)
    name = _parser().parse_args(words[:1]).command
    if words[1:] in (["-h"], ["--help"]):
        return show_help(name, lambda: _command(name, args, words))
    code = _command(name, args, words)
    if code:
        sys.exit(code)


def _help_of(name: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _run([name, "--help"])
    return printed.getvalue()


def _command(name: str, args: list[str] | None, words: list[str]) -> int | None:
    module = import_module(COMMANDS[name][0])
    if module.__name__ == TRAINING:  # LightningCLI reads its own command, from sys.argv unless a test gives arguments
        return module.main(args)
    try:
        return module.main(words[1:])
    except UserError as error:
        refuse(error)


def refuse(error: BaseException) -> NoReturn:
    """Prints an error that is meant for the user, and ends with exit code 1."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte", description="Learn To be Efficient: structured sparsity that a model learns.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lte-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.epilog = "lte COMMAND --help shows a command's options."
    return parser

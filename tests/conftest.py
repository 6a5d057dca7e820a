"""Environment, seeds and goldens of all tests."""

import atexit
import contextlib
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A shell lets its background jobs ignore interrupts, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of torch or of anything by Hugging Face: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lte-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import hypothesis
import lightning.pytorch  # noqa: F401 - see below
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Lightning is imported before what the tests import: typing takes Union[int, float] for the first Union of both that it
# met, and a limit of 0 batches would be read as 0.0.
# The same examples on every machine, however slow it is.
hypothesis.settings.register_profile("lte", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lte")

# OpenVINO reports every conversion to its makers, from a process of its own. Without this package it cannot.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-goldens", action="store_true", help="run the tests with goldens only, and rewrite these"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("rewrite_goldens"):
        others = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture
def forgets_selectors() -> Iterator[None]:
    """What the test registers as a selector is forgotten after it, and so is the module that it wrote."""
    from lte_lightning.selection import registry

    before = dict(registry._selectors)
    yield
    sys.modules.pop("my_baselines", None)
    registry._selectors.clear()
    registry._selectors.update(before)


@pytest.fixture
def no_file_larger_than() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with no_file_larger_than(size)`: what a full disk is to a process, a write that fails after a part of it."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


class Terminal(io.StringIO):
    """A terminal's screen of endless height: what tqdm and printed lines leave on it."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.row, self.column = [""], 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for piece in re.findall(r"\x1b\[A|\x1b\[[\d;]*m|[\r\n]|[^\r\n\x1b]+", text):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":  # the terminal's driver also returns the carriage
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif piece == "\x1b[A":
                self.row -= 1
            elif piece[0] != "\x1b":  # the rest are colours
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + piece + row[self.column + len(piece) :]
                self.column += len(piece)
        return super().write(text)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """This process's stdout and stderr."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def lines(self) -> list[str]:
        """The rows that are not empty."""
        return [row.rstrip() for row in self.rows if row.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_store_named() -> Iterator[None]:
    """What ``mlflow.set_tracking_uri`` leaves in the environment would be the next test's store."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def mlflow_tables() -> None:
    """MLflow's new SQLite databases are copies of an empty one: its migrations take two seconds.

    Nothing is imported for this, so a process's first database may still be migrated.
    """
    utils = sys.modules.get("mlflow.store.db.utils")
    if utils is None or hasattr(utils._initialize_tables, "__wrapped__"):
        return
    migrate = utils._initialize_tables

    @functools.cache
    def empty() -> sqlite3.Connection:
        import sqlalchemy

        database = sqlite3.connect(":memory:", check_same_thread=False)
        with tempfile.TemporaryDirectory() as folder:
            migrate(sqlalchemy.create_engine(f"sqlite:///{folder}/empty.db"))
            with contextlib.closing(sqlite3.connect(f"{folder}/empty.db")) as file:
                file.backup(database)
        return database

    @functools.wraps(migrate)
    def copy(engine: Any) -> None:
        if engine.dialect.name != "sqlite":
            migrate(engine)
            return
        with contextlib.closing(engine.raw_connection()) as connection:
            empty().backup(connection.driver_connection)

    utils._initialize_tables = copy


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def make_lm_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_lm_tokenizer(chat=False, **tokens)`: a small byte-level BPE tokenizer; it knows the letters, and no pad."""

    def make(chat: bool = False, **tokens: str) -> PreTrainedTokenizerFast:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        text = "Input: name[the cat], food[a fish] --- Output: the cat eats a fish. Answer: A B C D\n"
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        )
        bpe.train_from_iterator([text], trainer)
        known = {"unk_token": "<unk>", "eos_token": "</s>"} | tokens
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, **{key: value for key, value in known.items() if value is not None}
        )
        if chat:
            tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`golden(name, value)` compares nested dicts and lists of numbers with tests/goldens/<name>.json.

    Floats agree within `rtol` and `atol`, everything else exactly. With --rewrite-goldens the file is written instead.
    """

    def check(name: str, value: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
        path = GOLDENS / f"{name}.json"
        if request.config.getoption("rewrite_goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rounded(value), indent=1, allow_nan=False) + "\n")
            return
        if not path.exists():
            pytest.fail(
                f"no golden {path}: write it with `nox -s goldens -- -k {request.node.originalname}`, and commit it"
            )
        wrong = differences(value, json.loads(path.read_text()), rtol, atol)
        if wrong:
            pytest.fail(f"differs from {path} (rewrite: `nox -s goldens`):\n" + "\n".join(wrong))

    return check


def rounded(value: Any) -> Any:
    """Six digits: enough for every tolerance, and noise stays out of the diffs."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def differences(value: Any, expected: Any, rtol: float, atol: float, where: str = "value") -> list[str]:
    """One line for each place where two nested structures differ."""
    if isinstance(expected, dict) and isinstance(value, dict) and expected.keys() == value.keys():
        pairs = [(f"{where}[{key!r}]", value[key], expected[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(value, list | tuple) and len(expected) == len(value):
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(value, expected, strict=True))]
    elif isinstance(expected, float) and isinstance(value, float):
        return (
            [] if abs(value - expected) <= atol + rtol * abs(expected) else [f"{where}: {value!r}, golden {expected!r}"]
        )
    else:
        return (
            [] if type(value) is type(expected) and value == expected else [f"{where}: {value!r}, golden {expected!r}"]
        )
    return [line for name, mine, theirs in pairs for line in differences(mine, theirs, rtol, atol, name)]


@pytest.fixture
def harness_task(tmp_path) -> Callable[..., dict[str, Any]]:
    """`harness_task(rows, metric, ...)`: a task of the lm-evaluation-harness on rows of question, choices, answer."""

    def make(rows: list[dict[str, Any]], *metrics: str) -> dict[str, Any]:
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "task": "meals",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": metric} for metric in metrics],
        }

    return make

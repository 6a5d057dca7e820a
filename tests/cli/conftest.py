"""A tiny model, tiny GLUE folders, and the command line run on them in this process."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from lte_lightning.callbacks import StageSchedule
from lte_lightning.cli import main
from lte_lightning.cli.check import check_commands
from lte_lightning.cli.training import LteCLI, make_cli

FILLERS = [
    "the",
    "a",
    "film",
    "plot",
    "is",
    "was",
    "very",
    "not",
    "cat",
    "dog",
    "sat",
    "ran",
    "and",
    "of",
    "in",
    "it",
    "story",
    "end",
]
GOOD, BAD = ["good", "bright", "fine"], ["bad", "dull", "poor"]


def sentence(generator: random.Random, words: list[str], length: int) -> str:
    """`length` words, one of which is from `words` and decides the label."""
    text = generator.choices(FILLERS, k=length - 1)
    text.insert(generator.randrange(length), generator.choice(words))
    return " ".join(text)


def sst2_rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [
        {"sentence": sentence(generator, (BAD, GOOD)[i % 2], 3 + i % 7), "label": i % 2, "idx": i} for i in range(count)
    ]


def pair_rows(count: int, seed: int, columns: tuple[str, str], label: Callable[[int], float]) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [
        {
            columns[0]: sentence(generator, (BAD, GOOD)[i % 2], 4),
            columns[1]: sentence(generator, (BAD, GOOD)[i // 2 % 2], 3 + i % 3),
            "label": label(i),
        }
        for i in range(count)
    ]


def write_rows(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass(frozen=True)
class Tiny:
    """Folders of a model and of three tasks, and the configuration of a fit in a second or two."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def task(self, name: str) -> Path:
        return self.folder / name

    def config(self, task: str = "sst2", epochs: tuple[int, int, int] = (1, 1, 1), **more: Any) -> dict[str, Any]:
        """The fit's configuration; `more` has dotted keys."""
        config = {
            "seed_everything": 1,
            "model": {
                "class_path": "lte_lightning.tasks.Classification",
                "init_args": {"pretrained": str(self.model), "efficiency_weight": 1.0, "lte": {"expert_size": 8}},
            },
            "data": {
                "class_path": "lte_lightning.data.GlueData",
                "init_args": {"task": task, "source": str(self.task(task)), "max_length": 16, "batch_size": 8},
            },
            "stages": {
                stage: {"epochs": count, "learning_rate": 5e-3}
                for stage, count in zip(("dense", "router", "expert"), epochs, strict=True)
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
                "enable_progress_bar": False,
            },
        }
        return put(config, more)


def put(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Sets the options that have dotted keys in `more`."""
    for key, value in more.items():
        *path, last = key.split(".")
        inner = config
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *GOOD, *BAD]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    tokenizer.save_pretrained(tiny.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Wider than BERT's 0.02, or so narrow a model learns nothing in a few dozen steps.
    config = BertConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.1, **sizes)
    BertModel(config).save_pretrained(tiny.model)
    write_rows(tiny.task("sst2"), train=sst2_rows(64, 0), validation=sst2_rows(20, 1))
    columns = ("sentence1", "sentence2")
    write_rows(
        tiny.task("stsb"),
        train=pair_rows(32, 0, columns, lambda i: float(i % 4)),
        validation=pair_rows(12, 1, columns, lambda i: float(i % 4)),
    )
    columns = ("premise", "hypothesis")
    write_rows(
        tiny.task("mnli"),
        train=pair_rows(32, 0, columns, lambda i: i % 3),
        validation_matched=pair_rows(12, 1, columns, lambda i: i % 3),
        validation_mismatched=pair_rows(9, 2, columns, lambda i: i % 3),
    )
    return tiny


@pytest.fixture(scope="session")
def calm(tiny, tmp_path_factory) -> Path:
    """The tiny model without dropout."""
    folder = tmp_path_factory.mktemp("calm")
    BertConfig.from_pretrained(tiny.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(
        folder
    )
    for file in tiny.model.iterdir():
        if file.name != "config.json":
            (folder / file.name).hardlink_to(file)
    return folder


@dataclass(frozen=True)
class TinyLm(Tiny):
    """A tiny decoder, and folders of data for it."""

    def config(self, data: str = "GenerationData", epochs: tuple[int, int, int] = (1, 1, 1), **more: Any) -> dict:
        module, options = {
            "GenerationData": ("Generation", {"task": "e2e", "source": str(self.task("e2e"))}),
            "InstructData": ("Generation", {"source": str(self.task("instruct"))}),
            "MmluData": ("Mmlu", {"source": str(self.task("mmlu")), "max_length": 256, "shots": 1}),
            "LanguageModelData": ("LanguageModel", {"source": str(self.task("text")), "block_size": 32}),
        }[data]
        if module == "Generation":
            options |= {"max_length": 64 if data == "GenerationData" else 256, "max_new_tokens": 8}
        config = super().config("sst2", epochs)
        config["model"]["class_path"] = f"lte_lightning.tasks.{module}"
        options |= {} if data == "MmluData" else {"batch_size": 8}
        config["data"] = {"class_path": f"lte_lightning.data.{data}", "init_args": options}
        return put(config, more)


ANIMALS = ["cat", "dog", "fish", "bird", "cow", "owl"]


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory, make_lm_tokenizer) -> TinyLm:
    tiny = TinyLm(tmp_path_factory.mktemp("tiny-lm"))
    tokenizer = make_lm_tokenizer()
    tokenizer.save_pretrained(tiny.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(max_position_embeddings=256, initializer_range=0.1, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(tiny.model)
    rows = [
        {"meaning_representation": f"name[{animal}], food[{food}]", "human_reference": text.format(animal, food)}
        for text in ("the {} eats {}.", "{}: {}")
        for animal in ANIMALS
        for food in ANIMALS
        if animal != food
    ]
    write_rows(tiny.task("e2e"), train=rows, validation=[row for row in rows if "name[cow]" in str(row)])
    rows = [{"instruction": f"say {animal}", "input": "", "output": animal} for animal in ANIMALS]
    write_rows(tiny.task("instruct"), train=rows * 3, validation=rows)
    question = {"question": "who eats?", "choices": ["a cat", "a dog", "a cow", "an owl"]}
    write_rows(
        tiny.task("mmlu"),
        dev=[question | {"subject": subject, "answer": 1} for subject in ("big_cats", "dogs")],
        test=[question | {"subject": ("dogs", "big_cats")[i % 3 == 0], "answer": i % 4} for i in range(10)],
    )
    tiny.task("text").mkdir()
    for split, meals in (("train", "abcdefghij"), ("validation", "bdh")):
        text = "".join(f" = The {a} = \n\n The {a} eats the {b} .\n" for a in ANIMALS for b in meals)
        (tiny.task("text") / f"{split}.txt").write_text(text)
    return tiny


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def written(self) -> Path:
        """The path on the last line of the output."""
        return Path(self.out.splitlines()[-1])

    @property
    def results(self) -> dict[str, Any]:
        return json.loads(self.written.read_text())

    @property
    def run(self) -> Path:
        """The only run's folder."""
        (file,) = self.cwd.glob("runs/*/*/run.json")
        return file.parent


@pytest.fixture(scope="session")
def lightning() -> Callable[..., Outcome]:
    """`lightning(cwd, config, "fit", *args)` runs the command in a folder; the configuration may be None."""

    def run(cwd: Path, config: dict[str, Any] | None, command: str, *args: object) -> Outcome:
        words = [command]
        if config is not None:
            (cwd / "fit.yaml").write_text(yaml.safe_dump(config))
            words += ["--config", "fit.yaml"]
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv, on_sigterm = ["lightning", *words, *map(str, args)], signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ),  # MLflow leaves its tracking URI there, for the next command to find
        ):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
        assert signal.getsignal(signal.SIGTERM) is on_sigterm  # a command leaves its caller's handler
        return Outcome(code, out.getvalue(), err.getvalue(), cwd)

    return run


@pytest.fixture
def sweep_file(tiny, tmp_path) -> Callable[..., Path]:
    """`sweep_file(**content)` writes a sweep over a tiny fit."""

    def write(epochs: tuple[int, int, int] = (2, 1, 1), **content: Any) -> Path:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny.config(epochs=epochs)))
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump({"configs": ["tiny.yaml"]} | content))
        return tmp_path / "trial.yaml"

    return write


@pytest.fixture
def sweep(lightning, tmp_path) -> Callable[..., Outcome]:
    """`sweep(*words)` runs `lte sweep` in the test's folder."""
    return lambda *words: lightning(tmp_path, None, "sweep", *words)


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a sweep's fits, by name."""
    found = {}
    for file in folder.glob("*/results.json"):
        name = json.loads((file.parent / "run.json").read_text())["name"]
        assert name not in found
        found[name] = json.loads(file.read_text())
    return found


@pytest.fixture
def checked_here(monkeypatch) -> None:
    """`lte sweep` reads command lines in this process, which has imported Lightning: another takes eight seconds to.

    Tests without this fixture show that the other process answers the same way.
    """

    def check(words: list[str], input: str, **_: Any) -> subprocess.CompletedProcess:
        assert words == [sys.executable, "-m", "lte_lightning.cli.check"]
        with mock.patch.object(sys, "argv", ["lte"]):
            answers = check_commands(json.loads(input))
        return subprocess.CompletedProcess(words, 0, json.dumps(answers), "")

    monkeypatch.setattr("lte_lightning.cli.sweep.subprocess", SimpleNamespace(run=check))


class Here:
    """A sweep's runner of fits, one at a time, that runs them in this process."""

    slots = 1

    def __init__(self, lightning: Callable[..., Outcome]) -> None:
        self.lightning, self.ended = lightning, {}

    def start(self, name: str, words: list[str], log: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a process of its own: lines of the log, not errors
            done = self.lightning(Path.cwd(), None, *words)
        with log.open("a") as file:
            file.write(done.out + done.err)
        self.ended[name] = done.code

    def wait(self, patience: float) -> tuple[str, int] | None:
        return self.ended.popitem() if self.ended else None

    def stop(self) -> None:
        """Nothing runs: `start` returns when the fit has ended."""


@pytest.fixture
def fits_here(checked_here, lightning, monkeypatch) -> None:
    """`lte sweep` runs its fits in this process too. Tests without this fixture show that processes do the same."""
    monkeypatch.setattr("lte_lightning.cli.sweep._runner", lambda given: Here(lightning))


@pytest.fixture(scope="session")
def processes() -> Callable[..., Outcome]:
    """`processes(2, cwd, config, "fit")` runs a command in processes that begin with everything imported.

    They share out the weights (FSDP2), unless ``trainer.strategy`` is given.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lte_lightning.cli.training", "transformers.models.bert.modeling_bert"])

    def run(count: int, cwd: Path, config: dict[str, Any], command: str, *args: object, **more: Any) -> Outcome:
        cwd.mkdir(exist_ok=True)
        trainer = config["trainer"] | {"devices": count, "strategy": "fsdp2"}
        (cwd / "fit.yaml").write_text(yaml.safe_dump(put(config | {"trainer": trainer}, more)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
        words = [command, "--config", "fit.yaml", *map(str, args)]
        started = []
        for rank in range(count):
            given = {"words": words, "cwd": str(cwd), "env": place | {"LOCAL_RANK": str(rank)}}
            file = str(Path(__file__).with_name("one_of_many.py"))
            started.append(context.Process(target=runpy.run_path, args=(file, {"given": given}, "__main__")))
            started[-1].start()
        while any(alive := [process.exitcode is None for process in started]):
            if not all(alive) and any(process.exitcode for process in started):
                time.sleep(2)  # the others may be saying why
                for process in started:
                    process.kill()
            time.sleep(0.05)
        codes = [process.exitcode for process in started]
        out, err = ((cwd / f"{name}-0.txt").read_text() for name in ("out", "err"))
        assert "sync_dist" not in err  # Lightning's warning that values were not summed over devices
        return Outcome(next(filter(None, codes), 0), out, err, cwd)

    return run


@pytest.fixture(scope="session")
def fitted(tiny, lightning, tmp_path_factory) -> Outcome:
    """One fit through all stages, with MLflow; nobody changes its folder."""
    cwd = tmp_path_factory.mktemp("fitted")
    config = tiny.config(
        epochs=(2, 3, 2), **{"trainer.logger": True, "stages.router.router_learning_rate": 0.03, "run.name": "first"}
    )
    outcome = lightning(cwd, config, "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def parse(tmp_path) -> Callable[..., LteCLI]:
    """`parse(*args)` parses and instantiates what a command would use, in an empty folder."""

    def run(*args: object) -> LteCLI:
        with contextlib.chdir(tmp_path), mock.patch.object(sys, "argv", ["lightning"]):
            return make_cli([*map(str, args), "--trainer.logger", "false"], run=False)

    return run


@pytest.fixture
def break_at(monkeypatch) -> Callable[[int, BaseException], None]:
    """`break_at(step, error)` lets the fits of this test end with an error when `step` steps are done."""
    whole = StageSchedule.on_train_batch_start

    def arrange(step: int, error: BaseException) -> None:
        def hook(self: StageSchedule, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                raise error
            whole(self, trainer, *args)

        monkeypatch.setattr(StageSchedule, "on_train_batch_start", hook)

    return arrange

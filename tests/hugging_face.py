"""Runs Hugging Face's own tests of any model on converted ones: `nox -s hf-tests -- FOLDER`, nothing of theirs is kept.

FOLDER is the `tests` folder of transformers, of the version that is installed. Of a source distribution
(`pip download --no-binary :all: --no-deps transformers==VERSION`) it has the common tests of models; a checkout has
those of generation and export as well. They need the package `parameterized`. Each family is tried plain and converted,
all experts on; what fails converted alone is shown, and makes the exit code 1.
"""

import argparse
import os
import runpy
import sys
import types
import unittest
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns

FAMILIES = runpy.run_path(str(Path(__file__).with_name("core") / "conftest.py"))
SKIPPED_WITHOUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def theirs(folder: Path) -> Any:
    """Imports their common tests; what a source distribution lacks is replaced by tests of nothing."""
    package = types.ModuleType("hf_tests")
    package.__path__ = [str(folder)]
    sys.modules["hf_tests"] = package
    for name, mixin in SKIPPED_WITHOUT.items():
        if not (folder / f"{name.replace('.', '/')}.py").exists():
            parent = types.ModuleType(f"hf_tests.{name.partition('.')[0]}")
            parent.__path__ = []
            module = types.ModuleType(f"hf_tests.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules |= {parent.__name__: parent, module.__name__: module}
    return import_module("hf_tests.test_modeling_common")


def converted(plain: Any) -> Any:
    """Returns a class that makes converted models, all experts on, and loads what they saved by our function."""

    class Converted(plain):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # no instance of this class, for saving makes a plain one
            config = lte_lightning.LteConfig(16, "contiguous", threshold=1e-6)  # no score is as low
            return _all_on(lte_lightning.convert(plain(*args, **kwargs), config, progress=False))

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            source = pretrained_model_name_or_path
            if source is not None and (Path(str(source)) / "lte_config.json").exists():
                found: Any = lte_lightning.from_pretrained(source, plain, **kwargs)
                _all_on(found[0] if isinstance(found, tuple) else found)  # with output_loading_info
                return found
            return plain.from_pretrained(source, *args, **kwargs)

    Converted.__name__, Converted.__qualname__, Converted.__module__ = plain.__name__, plain.__name__, plain.__module__
    return Converted


def _all_on(model: Any) -> Any:
    lte_lightning.set_mode(model, "hard")
    for ffn in expert_ffns(model).values():
        ffn.selector.requires_grad_(False)  # as in the expert stage
    return model


class Tester:
    """What their tests ask of a model's own tests."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    encoder_seq_length = decoder_seq_length = key_length = 7

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        config = FAMILIES["FAMILIES"][self.family](0.0)
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids_BT = torch.randint(3, 60, (self.batch_size, self.seq_length))
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids_BT.clone(), "decoder_attention_mask": torch.ones_like(ids_BT)}
        return config, inputs


def make_classes(common: Any, families: list[str]) -> dict[str, type]:
    """Returns a test case for each family, plain and converted."""
    made = {}
    for family in families:
        config = FAMILIES["FAMILIES"][family](0.0)
        decoder = family in FAMILIES["DECODERS"]
        auto = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto
        plain = type(auto.from_config(config))
        for kind, cls in (("plain", plain), ("converted", converted(plain))):
            body = {
                "all_model_classes": (cls,),
                "setUp": lambda self, family=family: setattr(self, "model_tester", Tester(family)),
                "is_encoder_decoder": config.is_encoder_decoder,
            }
            name = f"Test_{kind}_{family.replace('-', '_')}"
            made[name] = type(name, (common.ModelTesterMixin, unittest.TestCase), body)
    return made


class Outcomes:
    """A plugin of pytest that keeps what each test came to."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            _, name, test = report.nodeid.split("::")
            kind, _, family = name.removeprefix("Test_").partition("_")
            lines = [line for line in str(report.longrepr or "").splitlines() if line.startswith("E ")]
            before = self.found.setdefault((family, test), {}).get(kind)
            if before is None or before[0] != "failed":  # of several parts one may fail
                self.found[family, test][kind] = (report.outcome, (lines or [""])[0][1:].strip()[:160])


def show(found: dict[tuple[str, str], dict[str, tuple[str, str]]]) -> int:
    """Prints two tables; returns how many tests fail converted alone."""
    print(
        "\n| family | passed, plain | passed, converted | failed, both | failed, converted alone |"
        "\n|---|---|---|---|---|"
    )
    alone = []
    counts: Counter[tuple[str, str]] = Counter()
    for (family, test), kinds in found.items():
        plain, mine = kinds.get("plain", ("", "")), kinds.get("converted", ("", ""))
        counts[family, "plain"] += plain[0] == "passed"
        counts[family, "converted"] += mine[0] == "passed"
        counts[family, "both"] += plain[0] == mine[0] == "failed"
        if mine[0] == "failed" and plain[0] != "failed":
            alone.append((test, family, mine[1]))
            counts[family, "alone"] += 1
    for family in dict.fromkeys(family for family, _ in found):
        print(
            f"| {family} | "
            + " | ".join(str(counts[family, key]) for key in ("plain", "converted", "both", "alone"))
            + " |"
        )
    print("\n| test | family | what it says |\n|---|---|---|")
    for row in sorted(alone):
        print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
    return len(alone)


def main() -> int:
    """Runs them; exit code 1 if one fails on a converted model alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="transformers' tests, or the environment variable LTE_HF_TESTS", nargs="?"
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES["FAMILIES"]), choices=list(FAMILIES["FAMILIES"]))
    parser.add_argument("-k", default="", help="as of pytest")
    options = parser.parse_args()
    folder = options.folder or Path(os.environ.get("LTE_HF_TESTS", ""))
    if not (folder / "test_modeling_common.py").is_file():
        parser.error(f"{folder} has no test_modeling_common.py: give the tests folder of transformers")
    os.environ |= {"LTE_HF_TESTS": str(folder.absolute()), "LTE_HF_FAMILIES": " ".join(options.families)}
    outcomes = Outcomes()
    words = ["-q", "-p", "no:cacheprovider", "--tb=short", "--no-header", "-W", "ignore", "-c", os.devnull]
    words += ["--rootdir", str(Path(__file__).parent)]
    pytest.main([*words, *(["-k", options.k] if options.k else []), __file__], plugins=[outcomes])
    return 1 if not outcomes.found or show(outcomes.found) else 0


if __name__ == "__main__":
    sys.exit(main())
elif "LTE_HF_TESTS" in os.environ:
    globals().update(make_classes(theirs(Path(os.environ["LTE_HF_TESTS"])), os.environ["LTE_HF_FAMILIES"].split()))

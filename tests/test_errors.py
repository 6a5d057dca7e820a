import subprocess
import sys

import pytest

from lte_lightning.errors import meant


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("robertta", " (do you mean 'roberta'?)"),
        ("ROBERTA", " (do you mean 'roberta'?)"),
        ("gptneox", " (do you mean 'GPT_NeoX'?)"),
        ("zebra", ""),
        (17, ""),  # a key of a YAML file
    ],
)
def test_the_nearest_word_is_named(name, said):
    assert meant(name, ["roberta", "llama", "GPT_NeoX"]) == said


def test_the_remark_has_the_form_that_its_sentence_needs():
    assert meant("lama", {"llama": 1}, "; did you mean {}?") == "; did you mean llama?"


def test_families_are_known_without_torch():
    code = "import sys, lte_lightning.core.model.families as f; print(len(f.FAMILIES) > 20, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout.split(), done.returncode) == (["True", "False"], 0), done.stderr

"""Runs the numerics in Triton's interpreter, in a process of its own: the variable is read at the first import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.timeout(900)  # a hundred tests
def test_numerics_without_a_gpu():
    paths = [Path(__file__).with_name(f"test_{name}.py") for name in ("numerics", "model")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=15", *paths],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    count = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", result.stdout)}
    # Only CUDA graphs need a GPU.
    assert count["passed"] > 100, result.stdout
    assert count["skipped"] == 3, result.stdout

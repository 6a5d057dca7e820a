"""A real encoder on real sentences: MiniLM on a slice of SST-2, all stages, at two settings of the dial."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONF = Path(__file__).parents[2] / "conf" / "glue" / "minilm-sst2.yaml"
DATA = Path(os.environ.get("LTE_SHARED", "/nowhere"), "data", "glue", "sst2")

pytestmark = [
    pytest.mark.regression,
    pytest.mark.skipif(
        not DATA.is_dir(), reason="no shared data: LTE_SHARED does not name a folder with data/glue/sst2"
    ),
]


def start(root: Path, *arguments: str) -> subprocess.Popen:
    """Starts `lightning fit` on 1,600 training rows, one epoch per stage."""
    common = ["fit", "--config", str(CONF), "--data.init_args.source", str(DATA), "--data.init_args.train_rows", "1600"]
    common += [f"--stages.{stage}.epochs=1" for stage in ("dense", "router", "expert")]
    common += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--run.root", str(root)]
    root.mkdir()
    with (root / "log.txt").open("w") as log:
        words = [sys.executable, "-m", "lte_lightning", *common, *arguments]
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)


def results(root: Path, fit: subprocess.Popen) -> dict:
    """Waits for a fit and returns its results."""
    assert fit.wait() == 0, (root / "log.txt").read_text()
    (path,) = root.glob("*/*/results.json")
    return json.loads(path.read_text()) | {"model": str(path.parent / "model")}


def test_sparsity_follows_eta_and_the_goldens_hold(tmp_path, golden):
    """The fits that begin with the dense one run side by side, each on one thread."""
    root = tmp_path / "dense"
    dense = results(root, start(root, "--stages.router.epochs=0", "--stages.expert.epochs=0"))
    begin = ["--model.init_args.init_from", dense["model"], "--stages.dense.epochs=0"]
    fits = {}
    try:
        for eta in ("0.01", "0.1", "1.0"):
            fits[eta] = start(tmp_path / eta, *begin, "--model.init_args.efficiency_weight", eta)
        found = {eta: results(tmp_path / eta, fit) for eta, fit in fits.items()}
    finally:
        for fit in fits.values():
            fit.kill()
            fit.wait()

    sparsity = [result["sparsity"] for result in found.values()]
    assert sparsity == sorted(sparsity)
    assert sparsity[0] < 0.5 < 0.8 < sparsity[-1]
    assert all(result["dense"] == pytest.approx(dense["dense"]) for result in found.values())
    assert found["0.01"]["hard"] > dense["dense"] - 0.05

    # bfloat16 kernels differ between processors: an accuracy may move by a few rows of 872, a sparsity by little
    keys = ("dense", "soft", "hard_before", "hard", "sparsity")
    golden("minilm_sst2", {eta: {key: result[key] for key in keys} for eta, result in found.items()}, atol=0.025)
    assert dense["flops_per_token"] == dense["dense_flops_per_token"] == 2 * 6 * (4 * 384**2 + 2 * 384 * 1536)

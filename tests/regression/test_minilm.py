"""A real encoder on real sentences: MiniLM on a slice of SST-2, all stages, at two settings of the dial."""

import json
import os
from pathlib import Path

import pytest

from lte_lightning.cli import main

CONF = Path(__file__).parents[2] / "conf" / "glue" / "minilm-sst2.yaml"
DATA = Path(os.environ.get("LTE_SHARED", "/nowhere"), "data", "glue", "sst2")

pytestmark = [
    pytest.mark.regression,
    pytest.mark.skipif(
        not DATA.is_dir(), reason="no shared data: LTE_SHARED does not name a folder with data/glue/sst2"
    ),
]


def fit(root: Path, *arguments: str) -> dict:
    """Runs `lightning fit` on 1,600 training rows, one epoch per stage, and returns its results."""
    common = ["fit", "--config", str(CONF), "--data.init_args.source", str(DATA), "--data.init_args.train_rows", "1600"]
    common += [f"--stages.{stage}.epochs=1" for stage in ("dense", "router", "expert")]
    common += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--run.root", str(root)]
    main([*common, *arguments])
    (path,) = root.glob("*/*/results.json")
    return json.loads(path.read_text()) | {"model": str(path.parent / "model")}


def test_sparsity_follows_eta_and_the_goldens_hold(tmp_path, golden, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning"])
    dense = fit(tmp_path / "dense", "--stages.router.epochs=0", "--stages.expert.epochs=0")
    start = ["--model.init_args.init_from", dense["model"], "--stages.dense.epochs=0"]
    results = {
        eta: fit(tmp_path / eta, *start, "--model.init_args.efficiency_weight", eta) for eta in ("0.01", "0.1", "1.0")
    }

    sparsity = [result["sparsity"] for result in results.values()]
    assert sparsity == sorted(sparsity)
    assert sparsity[0] < 0.5 < 0.8 < sparsity[-1]
    assert all(result["dense"] == pytest.approx(dense["dense"]) for result in results.values())
    assert results["0.01"]["hard"] > dense["dense"] - 0.05

    # bfloat16 kernels differ between processors: an accuracy may move by a few rows of 872, a sparsity by little
    keys = ("dense", "soft", "hard_before", "hard", "sparsity")
    golden("minilm_sst2", {eta: {key: result[key] for key in keys} for eta, result in results.items()}, atol=0.025)
    assert dense["flops_per_token"] == dense["dense_flops_per_token"] == 2 * 6 * (4 * 384**2 + 2 * 384 * 1536)

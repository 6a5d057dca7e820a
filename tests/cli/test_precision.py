"""A fit through all stages in each precision, and on what cannot be trained on: it works, or says why in one line."""

import math

import pytest
import torch

EPOCHS = (1, 2, 1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision, tiny, lightning, tmp_path):
    config = tiny.config(epochs=EPOCHS, **{"trainer.precision": precision})
    fit = lightning(tmp_path, config, "fit")
    assert "Traceback" not in fit.err
    assert fit.code == 0, fit.err
    results = fit.results
    for view in ("dense", "soft", "hard_before", "hard"):
        assert 0 <= results[view] <= 1
    assert 0 <= results["sparsity"] <= 1
    assert results["versions"]["precision"] == precision
    state = torch.load(fit.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(math.isfinite(value.double().sum()) for value in state.values() if value.is_floating_point())
    tested = lightning(tmp_path, config, "test", "--model.init_from", fit.run / "model")
    assert tested.code == 0, tested.err
    assert tested.results["accuracy"] == pytest.approx(results["hard"], abs=0.051)  # of twenty rows one may fall


def test_half_precision_without_a_scaler_overflows_and_says_so(tiny, lightning, tmp_path):
    """Adam's epsilon is zero in float16."""
    fit = lightning(tmp_path, tiny.config(epochs=EPOCHS, **{"trainer.precision": "16-true"}), "fit")
    assert fit.code == 1
    assert "the training loss is nan in stage 'dense' at step" in fit.err
    assert "use trainer.precision 32-true" in fit.err
    assert "Traceback" not in fit.err


@pytest.mark.filterwarnings("ignore:You passed .* but AMP with fp16 is not supported on CPU:UserWarning")
def test_mixed_half_precision_on_a_cpu_is_that_of_bfloat16(tiny, lightning, tmp_path):
    """Lightning replaces it, with a warning; float16 itself needs a GPU."""
    fit = lightning(tmp_path, tiny.config(epochs=EPOCHS, **{"trainer.precision": "16-mixed"}), "fit")
    assert fit.code == 0, fit.err
    assert fit.results["versions"]["precision"] == "bf16-mixed"


def test_gradient_checkpointing_changes_no_weight(tiny, lightning, tmp_path):
    """Activations that are computed again are those that were: dropout's too, and no score is counted twice."""
    found = []
    for checkpointing in (False, True):
        cwd = tmp_path / str(checkpointing)
        cwd.mkdir()
        options = {"model.init_args.gradient_checkpointing": checkpointing}
        fit = lightning(cwd, tiny.config(epochs=EPOCHS, **options), "fit")
        assert fit.code == 0, fit.err
        found.append((torch.load(fit.run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], fit.results))
    (whole, expected), (recomputed, results) = found
    assert [name for name in whole if not torch.allclose(whole[name], recomputed[name], atol=1e-6)] == []
    for key in ("dense", "soft", "hard_before", "hard", "sparsity"):
        assert results[key] == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trainer.strategy", "fsdp"), "requires a GPU accelerator"),
        (("--trainer.strategy", "nonsense"), "nonsense"),
        (("--trainer.accelerator", "cuda"), "CUDAAccelerator"),
    ],
)
def test_what_lightning_refuses_is_one_line(options, said, tiny, lightning, tmp_path):
    if options[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU, which is not refused")
    fit = lightning(tmp_path, tiny.config(), "fit", *options)
    assert fit.code == 1
    assert said in fit.err
    assert "Traceback" not in fit.err
    assert not list(tmp_path.glob("runs/*/*"))

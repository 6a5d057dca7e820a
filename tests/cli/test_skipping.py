"""A fit whose expert stage skips experts, and the same fit that computes all and masks."""

import pytest
from safetensors.torch import load_file

from lte_lightning.core.model import prepared


@pytest.fixture
def skipped(monkeypatch):
    """The stages' modes and gradients in which experts were skipped; a tiny model is taken for a large one."""
    monkeypatch.setattr(prepared, "skips", lambda mask_NE, dtype: True)
    seen, run = [], prepared.Prepared.run
    monkeypatch.setattr(
        prepared.Prepared,
        "run",
        lambda self, x, mask: (seen.append((self.skipping, x.requires_grad)), run(self, x, mask))[1],
    )
    return seen


def test_the_expert_stage_ends_in_the_same_weights(tiny, lightning, tmp_path, skipped):
    lte = {"expert_size": 4, "target_sparsity": 0.5}
    ends = []
    for skips in (False, True):
        changes = {"model.init_args.lte": lte, "model.init_args.efficiency_weight": None}
        config = tiny.config(epochs=(0, 1, 1), **changes, **{"model.init_args.skip_experts": skips})
        (tmp_path / str(skips)).mkdir()
        fit = lightning(tmp_path / str(skips), config, "fit")
        assert fit.code == 0, fit.err
        assert (not any(skipping for skipping, _ in skipped)) != skips
        ends.append(load_file(fit.run / "model" / "model.safetensors"))
    assert {trained for skipping, trained in skipped if skipping} == {False, True}  # validation skips, too
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[0].items():
        if name.endswith("key.bias"):  # its gradient is zero but for rounding, of which AdamW makes whole steps
            continue
        assert (ends[1][name] - weight).abs().max() < 1e-4, name


def test_trained_routers_see_every_expert(tiny, lightning, tmp_path, skipped):
    config = tiny.config(epochs=(0, 1, 1), **{"model.init_args.freeze_routers": False})
    assert lightning(tmp_path, config, "fit").code == 0
    assert not any(skipping for skipping, _ in skipped)

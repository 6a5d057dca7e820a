import pytest
import torch

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.routing.calibrate import calibrate
from lte_lightning.core.routing.trace import RouterTrace


@pytest.fixture
def calibrated(build):
    """`calibrated(family, name)` gives a model at 0.5, and what each layer leaves out on the calibration rows."""

    def calibrated(family, name):
        model = convert(build(family), LteConfig(1, "contiguous", name, 0.5), progress=False).eval()
        torch.manual_seed(4)
        for ffn in expert_ffns(model).values():
            torch.nn.init.normal_(ffn.down.weight, std=0.5)  # so that each layer changes what the next is given
        ids_BT = torch.randint(3, 60, (8, 16))
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[::2, 10:] = 0

        def run():
            return model(input_ids=ids_BT, attention_mask=mask_BT)

        calibrate(model, iter([(run, (mask_BT,))]), 10**6)
        assert all(ffn.mode == "dense" for ffn in expert_ffns(model).values())
        set_mode(model, "hard")
        with torch.no_grad(), RouterTrace(model, mask_BT) as trace:
            run()
        sparse = [float((scores_NE <= 0.5).float().mean()) for scores_NE in trace.scores().values()]
        return model, sparse

    return calibrated


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_layer_has_the_sparsity_that_is_asked_for_behind_sparse_layers(family, calibrated):
    _, sparse = calibrated(family, "cats")
    assert sparse == pytest.approx([0.5] * 2, abs=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_level_for_all_layers_gives_the_mean(family, calibrated):
    model, sparse = calibrated(family, "d2dmoe")
    assert sum(sparse) / 2 == pytest.approx(0.5, abs=0.01)
    assert max(sparse) - min(sparse) > 0.01
    assert len({float(ffn.selector.level) for ffn in expert_ffns(model).values()}) == 1

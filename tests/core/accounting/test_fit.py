"""What the stages of a fit take on several devices."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lte_lightning import LteConfig, convert
from lte_lightning.core.accounting.cost import token_cost
from lte_lightning.core.accounting.fit import Machines, stage_costs
from lte_lightning.core.accounting.memory import training_memory
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.errors import UserError
from lte_lightning.kernels.roofline import Gpu

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
GPU = Gpu(bandwidth=1e12, flops_16=4e12, flops_32=1e12)


def model(**how):
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SIZES))
    return convert(plain, LteConfig(16, "contiguous", **how), progress=False)


def costs(devices=1, strategy="ddp", precision="32-true", link=1e30, gpu=GPU):
    return stage_costs(model(), 2, 32, precision, strategy, Machines(devices, gpu, link, 0.5))


def test_stages_hold_what_they_train():
    router = sum(p.numel() for p in selector_parameters(model()))
    found = costs()
    assert list(found) == ["dense", "router", "expert"]
    for stage in ("dense", "expert"):
        assert found["router"].memory.gradients - found[stage].memory.gradients == 4 * router
        assert found["router"].memory.optimizer - found[stage].memory.optimizer == 8 * router
        assert found[stage].memory.weights == found["router"].memory.weights
    assert found["router"].memory == training_memory(model(), 64, "32-true")
    assert found["router"].memory.activations > found["expert"].memory.activations


def test_a_step_is_its_products_and_what_the_optimizer_moves():
    counted = model()
    dense = token_cost(counted, context=32).flops
    router = sum(2 * p.numel() for n, p in counted.named_parameters() if "selector" in n and p.dim() == 2)
    found = costs()
    for stage, passes, again in (
        ("dense", 3 * dense, dense),
        ("router", 3 * (dense + router), dense + router),
        ("expert", 3 * dense + router, dense),
    ):
        memory = found[stage].memory
        update = (3 * memory.gradients + 2 * memory.optimizer) / 1e12
        assert found[stage].step == pytest.approx(64 * passes / 0.5e12 + update)
        assert found[stage].step_checkpointed == pytest.approx(64 * (passes + again) / 0.5e12 + update)
        assert found[stage].communication == 0


def test_half_precision_has_its_own_peak():
    slow, fast = (costs(precision=name, gpu=Gpu(1e30, 4e12, 1e12))["dense"].step for name in ("32-true", "bf16-mixed"))
    assert slow == pytest.approx(4 * fast)
    assert costs(precision="64-true")["dense"].step is None


def test_what_is_sent():
    """A slow link is all that a step takes."""
    weights = sum(p.numel() for p in model().parameters())
    trained = weights - sum(p.numel() for p in selector_parameters(model()))
    one, two, many = (costs(devices, link=1e3)["dense"] for devices in (1, 2, 1_000_000))
    assert one.communication == 0
    assert two.communication == pytest.approx(4 * trained / 1e3)  # 2 (N-1)/N
    assert many.communication == pytest.approx(2 * two.communication, rel=1e-4)
    sharded = costs(2, "fsdp2", link=1e3)["dense"]
    assert sharded.communication == pytest.approx(4 * (2 * weights + trained) / 2 / 1e3)
    assert sharded.step == pytest.approx(sharded.communication, rel=1e-3)


def test_sharing_weights_saves_memory():
    found = [costs(devices, "fsdp2")["router"].memory for devices in (1, 8)]
    assert found[1].weights == found[0].weights // 8
    assert found[1] == training_memory(model(), 64, "32-true", devices=8, sharded=True)


@pytest.mark.parametrize("how", [{"selector": "kla"}, {"selector": "moefication"}])
def test_what_learns_otherwise_is_refused(how):
    selector = how["selector"]
    with pytest.raises(UserError, match=f"selector '{selector}' does not learn with the task"):
        stage_costs(model(target_sparsity=0.5, **how), 1, 8, "32-true", "ddp", Machines(1, GPU, 1e9, 0.5))

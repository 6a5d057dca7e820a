"""A sequence alone and in a batch: the same bits within `equal_rows`, and nearly so without it."""

import pytest
import torch

from lte_lightning import LteConfig, convert, equal_rows, quantize, set_backend, set_mode
from lte_lightning.kernels.equal_rows import _SPLIT

FAMILIES = (
    *(("bert", "classification"), ("deberta-v2", "classification"), ("modernbert", "classification")),
    *(("llama", "lm"), ("gpt2", "lm"), ("falcon", "lm"), ("opt", "lm"), ("t5", "lm")),
)


@pytest.fixture
def make(build, scatter):
    """`make(family, head, dtype, backend)`: a model in hard mode."""

    def make(family, head, dtype, backend):
        model = scatter(convert(build(family, head, 0.0).eval(), LteConfig(expert_size=16), progress=False)).to(dtype)
        set_mode(model, "hard")
        set_backend(model, backend)
        return model

    return make


def inputs(model, rows=9, length=7):
    """A batch, some of whose rows are padded."""
    ids_BT = torch.randint(5, 60, (rows, length))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[3, 4:] = mask_BT[5, 2:] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return batch | ({"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def together_and_alone(model, batch):
    rows = len(batch["input_ids"])
    together = model(**batch).logits
    alone = [model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in range(rows)]
    return together, torch.cat(alone)


@pytest.mark.parametrize("backend", ["cpu", "dense-mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_bits(family, head, dtype, backend, make):
    model = make(family, head, dtype, backend)
    batch = inputs(model)
    with equal_rows():
        together, alone = together_and_alone(model, batch)
    assert together.equal(alone)
    plain, plain_alone = together_and_alone(model, batch)
    for other in (together, plain_alone):  # nearly: a score at the threshold may fall on its other side
        assert ((plain - other).abs() > 0.1).float().mean() < (0.001 if dtype == torch.float32 else 0.05)


def test_bits_differ_without_it(make):
    """Or the test above would say nothing."""
    model = make("bert", "classification", torch.float32, "cpu")
    together, alone = together_and_alone(model, inputs(model))
    assert not together.equal(alone)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bits_of_quantised_weights(kind, build, scatter):
    model = scatter(convert(build("llama", "lm", 0.0).eval(), LteConfig(expert_size=16), progress=False))
    set_mode(model, "hard")
    quantize(model, kind)
    with equal_rows():
        together, alone = together_and_alone(model, inputs(model))
    assert together.equal(alone)


def test_gradients_flow_through_it():
    x_NK, w_KM = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with equal_rows():
        (x_NK @ w_KM).sum().backward()
    torch.testing.assert_close(x_NK.grad, w_KM.sum(dim=1).expand(3, 4))


def test_every_operator_of_ours_that_computes_tokens_is_known():
    names = {str(func) for func in _SPLIT}
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lte_lightning::")}
    ours = {name for name in ours if "quantized" in name or "cpu" in name}
    assert {f"{name.replace('::', '.')}.default" for name in ours} <= names

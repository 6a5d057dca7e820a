"""What is not finite in the weights of experts that no token selected never leaks, on any backend."""

import pytest
import torch

from lte_lightning import LteConfig, convert, set_backend, set_mode
from lte_lightning.core.convert import expert_ffns
from lte_lightning.core.ffn import weight_rows

IDLE = slice(16, 32)  # the neurons of the second expert


@pytest.fixture
def hard(build, scatter):
    """`hard(family)`: in hard mode and eval; about half of the experts run, the second of each layer never does."""

    def make(family="bert", head="classification"):
        model = scatter(convert(build(family, head, 0.0), LteConfig(expert_size=16), progress=False))
        set_mode(model, "hard")
        for ffn in expert_ffns(model).values():
            with torch.no_grad():
                ffn.selector.bias[1] = -1e4
        return model

    return make


@torch.no_grad()
def poison(model, value=torch.nan):
    for ffn in expert_ffns(model).values():
        for projection in (ffn.up, ffn.gate):
            if projection is not None:
                weight_rows(projection)[IDLE] = value
                if projection.bias is not None:
                    projection.bias[IDLE] = value
        weight_rows(ffn.down)[:, IDLE] = value
    return model


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["dense-mask", "auto", "reference"])
def test_is_not_seen(row_family, backend, value, hard, batch):
    model = hard(row_family)
    set_backend(model, backend)
    with torch.no_grad():
        expected = model(**batch).logits
        close(poison(model, value)(**batch).logits, expected)


@pytest.mark.parametrize("backend", ["dense-mask", "auto"])
def test_is_not_seen_under_autocast(row_family, backend, hard, batch):
    model = hard(row_family)
    set_backend(model, backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        close(poison(model)(**batch).logits, expected, 0.02)


def test_is_not_seen_in_train_mode_without_gradients(row_family, hard, batch):
    model = hard(row_family).train()
    with torch.no_grad():
        assert poison(model)(**batch).logits.isfinite().all()


def test_gradients_in_eval_mode_are_those_of_the_experts_that_ran(row_family, hard, batch):
    model, other = hard(row_family), poison(hard(row_family))
    for net in (model, other):
        net(**batch).logits.square().sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            close(mine.grad, theirs.grad, 1e-4)


def test_what_tokens_did_select_is_seen(hard, batch):
    model = hard()
    for ffn in expert_ffns(model).values():
        ffn.selector.bias.data[1] = 1e4
    with torch.no_grad():
        assert poison(model)(**batch).logits.isnan().all()


def test_torch_compile_traces_it_whole(hard, batch):
    model = hard("llama", "lm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(**batch).logits
        close(compiled(**batch).logits, expected)
        close(poison(compiled)(**batch).logits, expected)

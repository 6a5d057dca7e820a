"""LayerNorm of a residual sum, against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from lte_lightning.kernels.cpu import norm as module
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.kernels.cpu.norm import run_sum_norm

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(N, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*size, generator=generator) * 3).to(dtype) for size in ((2, N, D), (2, N, D), (D,), (D,))]


def check(x, residual, weight, bias, epsilon=1e-5, bound=None):
    out = run_sum_norm(x, residual, weight, bias, epsilon)
    wide = [None if each is None else each.double() for each in (x + residual, weight, bias)]
    expected = functional.layer_norm(wide[0], x.shape[-1:], *wide[1:], epsilon)
    assert out.dtype == x.dtype
    bound = bound or BOUNDS[x.dtype]
    torch.testing.assert_close(out.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("D", [1, 3, 16, 40, 64, 384, 770])
def test_sum_and_norm(D, dtype):
    x, residual, weight, bias = inputs(45, D, dtype)
    check(x, residual, weight, bias)
    check(x, residual, weight, None, 1e-2)
    check(x.transpose(0, 1), residual.transpose(0, 1), weight, bias)


def test_a_mean_far_from_zero_costs_no_more_digits_than_the_sum_itself():
    x, residual, weight, bias = inputs(5, 384)
    check(x + 1000.0, residual, weight, bias, bound=1e-3)  # a variance from a sum of squares would be off by 0.01


def test_rows_and_threads_change_no_bit():
    x, residual, weight, bias = inputs(70, 48, torch.bfloat16)
    out, threads = run_sum_norm(x, residual, weight, bias, 1e-5), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(run_sum_norm(x, residual, weight, bias, 1e-5), out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run_sum_norm(x[1:, 5:9], residual[1:, 5:9], weight, bias, 1e-5), out[1:, 5:9])
    x[0, 3, 7], residual[1, 2, 0] = torch.nan, torch.inf
    odd = run_sum_norm(x, residual, weight, bias, 1e-5)
    assert odd[0, 3].isnan().all()
    assert odd[1, 2].isnan().all()
    assert odd.isfinite().sum() == odd.numel() - 2 * 48


@pytest.mark.parametrize("instructions", instruction_sets())
def test_every_instruction_set_of_this_machine(instructions, monkeypatch):
    names = list(instruction_sets())
    if names.index(instructions) > names.index(instruction_set()):
        pytest.skip(f"this machine lacks {instructions}")
    lib = build(instructions)
    monkeypatch.setattr(module, "library", lambda: lib)
    for dtype in BOUNDS:
        check(*inputs(9, 100, dtype))


def test_without_a_compiler_torch_computes_it(monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    check(*inputs(9, 40))


def test_is_a_well_made_operator():
    torch.library.opcheck(torch.ops.lte_lightning.sum_norm, (*inputs(5, 9), 1e-5))


def test_nothing_to_do():
    x, residual, weight, bias = inputs(0, 8)
    assert run_sum_norm(x, residual, weight, bias, 1e-5).shape == (2, 0, 8)


def test_wrong_inputs_are_refused():
    x, residual, weight, bias = inputs(5, 9)
    with pytest.raises(ValueError, match="one type of"):
        run_sum_norm(x, residual.bfloat16(), weight, bias, 1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        run_sum_norm(x, residual, weight[:4], bias, 1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        run_sum_norm(x, residual[:1], weight, bias, 1e-5)

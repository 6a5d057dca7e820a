"""The attention of encoders, against torch's in float64."""

import ctypes

import pytest
import torch
from torch.nn import functional

from lte_lightning.kernels.cpu import attention as module
from lte_lightning.kernels.cpu.attention import run_attention
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(B, H, Q, K, D, dtype=torch.float32, seed=0):
    """q, k, v as a model makes them: views of [B, T, H * D]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H * D, generator=generator).to(dtype).view(B, T, H, D).transpose(1, 2) for T in (Q, K, K)]


def expected(q, k, v, mask=None, scale=0.3):
    q, k, v = (x.double() for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def close(actual, wanted):
    torch.testing.assert_close(actual.double(), wanted, atol=BOUNDS[actual.dtype], rtol=BOUNDS[actual.dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 128, 128, 64), (1, 2, 1, 1, 1), (2, 1, 25, 33, 7), (1, 2, 31, 700, 80)], ids=str
)
def test_attention(sizes, dtype):
    q, k, v = inputs(*sizes, dtype)
    out = run_attention(q, k, v, None, 0.3)
    assert out.is_contiguous()
    assert out.dtype == dtype
    close(out, expected(q, k, v))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(3, 1, 21, 37), (3, 1, 1, 37), (1, 1, 21, 37), (1, 1, 21, 1)], ids=str)
def test_masks(shape, dtype):
    q, k, v = inputs(3, 2, 21, 37, 16, dtype)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] |= ~mask.any(-1)
    close(run_attention(q, k, v, mask, 0.3), expected(q, k, v, mask))


def test_a_query_that_sees_nothing_gets_zeros_and_hidden_keys_do_not_count():
    q, k, v = inputs(1, 2, 5, 9, 16)
    mask = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    mask[0, 0, 2], mask[..., 4] = False, False
    out = run_attention(q, k, v, mask, 0.3)
    assert (out[0, 2] == 0).all()
    k[:, :, 4] = 1e4
    v[:, :, 4] = 1e30
    assert torch.equal(run_attention(q, k, v, mask, 0.3), out)


def test_rows_and_threads_change_no_bit():
    q, k, v = inputs(4, 3, 50, 50, 32, torch.bfloat16)
    out, threads = run_attention(q, k, v, None, 0.3), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(run_attention(q, k, v, None, 0.3), out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run_attention(q[2:3], k[2:3], v[2:3], None, 0.3), out[2:3])
    assert torch.equal(run_attention(q[:, :, 7:20], k, v, None, 0.3), out[:, 7:20])


def test_large_scores_and_nan():
    q, k, v = inputs(2, 1, 6, 40, 8)
    close(run_attention(q * 1000, k, v, None, 1.0), expected(q * 1000, k, v, scale=1.0))
    q[0, 0, 3, 0] = torch.nan
    out = run_attention(q, k, v, None, 0.3)
    assert out[0, 3].isnan().all()
    assert out.isfinite().sum() == out.numel() - 8


@pytest.mark.parametrize("instructions", instruction_sets())
def test_every_instruction_set_of_this_machine(instructions, monkeypatch):
    names = list(instruction_sets())
    if names.index(instructions) > names.index(instruction_set()):
        pytest.skip(f"this machine lacks {instructions}")
    lib = build(instructions)
    assert isinstance(lib, ctypes.CDLL)
    monkeypatch.setattr(module, "library", lambda: lib)
    for dtype in BOUNDS:
        q, k, v = inputs(2, 2, 30, 45, 20, dtype)
        mask = torch.arange(45) < 40
        close(run_attention(q, k, v, mask[None, None, None], 0.3), expected(q, k, v, mask[None]))


def test_without_a_compiler_torch_computes_it(monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    q, k, v = inputs(2, 2, 30, 45, 20)
    close(run_attention(q, k, v, None, 0.3), expected(q, k, v))


def test_is_a_well_made_operator():
    q, k, v = inputs(2, 2, 5, 9, 4)
    torch.library.opcheck(torch.ops.lte_lightning.attention, (q, k, v, torch.ones(2, 1, 5, 9, dtype=torch.bool), 0.3))


def test_wrong_inputs_are_refused():
    q, k, v = inputs(2, 2, 5, 9, 4)
    with pytest.raises(ValueError, match="share a type"):
        run_attention(q, k.bfloat16(), v, None, 0.3)
    with pytest.raises(ValueError, match="do not fit"):
        run_attention(q, k, v[:, :1], None, 0.3)
    with pytest.raises(ValueError, match="must be boolean"):
        run_attention(q, k, v, torch.zeros(2, 1, 5, 9), 0.3)

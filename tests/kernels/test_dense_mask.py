import pytest
import torch

from lte_lightning.kernels import scale_experts


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (5,), (0, 4)])
@pytest.mark.parametrize(("experts", "size"), [(4, 3), (1, 7), (6, 1)])
def test_each_slice_takes_its_factor(shape, experts, size):
    hidden = torch.randn(*shape, experts * size)
    factor = torch.rand(*shape, experts)
    expected = torch.cat([hidden[..., e * size : (e + 1) * size] * factor[..., e, None] for e in range(experts)], -1)
    assert scale_experts(hidden, factor).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_keeps_or_clears_and_the_type_stays(dtype):
    hidden = torch.randn(2, 3, 8).to(dtype)
    mask = torch.rand(2, 3, 4) > 0.5
    result = scale_experts(hidden, mask)
    assert result.dtype == dtype
    assert result.equal(torch.where(mask.repeat_interleave(2, dim=-1), hidden, torch.zeros((), dtype=dtype)))


def test_a_mask_clears_what_is_not_finite():
    """An expert that overflows for a token which did not select it is no harm."""
    hidden = torch.tensor([[1.0, torch.inf, torch.nan, 2.0]], requires_grad=True)
    result = scale_experts(hidden, torch.tensor([[True, False, False, True]]))
    assert result.tolist() == [[1.0, 0.0, 0.0, 2.0]]
    result.sum().backward()
    assert hidden.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_gradients():
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    factor = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scale_experts, (hidden, factor))

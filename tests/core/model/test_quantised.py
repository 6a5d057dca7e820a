"""Quantisation after conversion, in the order that the docs advise; before it, it is refused (test_exact.py)."""

import pytest
import torch
from torch import nn

from lte_lightning import LteConfig, convert, set_backend, set_mode
from lte_lightning.core.model.experts import MODES, expert_ffns

# torch 2.13 moves its quantisation to torchao, which is no dependency, and warns of its own calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


@pytest.mark.parametrize("backend", ["dense-mask", "auto"])
def test_dynamic_quantisation_after_conversion(row_family, backend, build, scatter, batch):
    model = scatter(convert(build(row_family, dropout=0.0), LteConfig(16, "contiguous"), progress=False))
    set_backend(model, backend)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for mode in MODES:
        set_mode(model, mode)
        set_mode(quantised, mode)
        with torch.no_grad():
            expected, actual = model(**batch).logits, quantised(**batch).logits
        assert actual.isfinite().all()
        assert not actual.equal(expected)
        # a score beside the threshold may fall on its other side
        tolerance = (0.7 if mode == "hard" else 0.2) * expected.abs().max()
        assert (actual - expected).abs().max() < tolerance
    for mine, plain in zip(expert_ffns(quantised).values(), expert_ffns(model).values(), strict=True):
        assert (mine.width, mine.neurons, mine.flops_dense()) == (plain.width, plain.neurons, plain.flops_dense())


def test_one_ffn_is_close_for_the_same_mask(build, scatter):
    model = scatter(convert(build("llama", "lm", 0.0), LteConfig(16, "contiguous"), progress=False))
    set_mode(model, "hard")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for mine, plain in zip(expert_ffns(quantised).values(), expert_ffns(model).values(), strict=True):
        x_BTD = torch.randn(2, 5, plain.width)
        with torch.no_grad():
            actual, expected = mine(x_BTD), plain(x_BTD)
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max()

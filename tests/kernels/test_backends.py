"""Every backend that runs on a CPU against the oracle."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.parts import FfnParts, find_row
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.ffn import run_compiled, run_cpu
from lte_lightning.kernels.cpu.instructions import instruction_set
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ACTIVATIONS
from lte_lightning.kernels.reference import run_reference
from lte_lightning.kernels.views import run_views
from lte_lightning.selection import Selector


def few(x_ND, mask_NE, weights):
    return run_compiled(build(instruction_set()), x_ND, mask_NE, weights, "few")


def many(x_ND, mask_NE, weights):
    return run_compiled(build(instruction_set()), x_ND, mask_NE, weights, "many")


class Given(Selector):
    """Selects what a test says."""

    def __init__(self, mask_NE):
        super().__init__()
        self.mask_NE = mask_NE

    def forward(self, x_BTD):
        return self.mask_NE.float().unsqueeze(0)


@torch.no_grad()
def model(x_ND, mask_NE, weights):
    """The dense-mask path of a model's FFN, which has its own modules and its own activation."""
    S = weights.up_ESD.shape[1]

    def linear(weight, bias):
        out, into = weight.shape
        projection = nn.Linear(into, out, bias is not None, dtype=weight.dtype)
        projection.weight.copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias.flatten())
        return projection

    up = linear(weights.up_ESD.flatten(0, 1), weights.up_bias_ES)
    gate = None if weights.gate_ESD is None else linear(weights.gate_ESD.flatten(0, 1), weights.gate_bias_ES)
    down = linear(weights.down_ESD.flatten(0, 1).T, weights.down_bias_D)
    parts = FfnParts(up, gate, down, ACTIVATIONS[weights.activation], None, find_row("llama"))
    ffn = ExpertFfn(parts, S, Given(mask_NE), 0.5).eval()
    ffn.mode = "hard"
    return ffn(x_ND.unsqueeze(0)).squeeze(0)


BACKENDS = {
    "cpu": run_cpu,
    "few": few,
    "many": many,
    "views": run_views,
    "dense-mask": run_dense_mask,
    "model": model,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 513])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrix(backend, gated, dtype, tokens, make_weights, assert_agrees):
    E, S, D = 5, 24, 70  # F is no power of two, and no dimension fits a vector
    for activation in ACTIVATIONS:
        for biases in (False, True):
            weights = make_weights(E, S, D, activation, gated, biases, DTYPES[dtype])
            x_ND = torch.randn(tokens, D).to(DTYPES[dtype])
            some_NE = torch.rand(tokens, E) > 0.5
            one_NE = torch.arange(E).expand(tokens, E) == 3
            for mask_NE in (some_NE, one_NE, torch.ones_like(some_NE), torch.zeros_like(some_NE)):
                expected = run_reference(x_ND, mask_NE, weights)
                assert_agrees(BACKENDS[backend](x_ND, mask_NE, weights), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    tokens=st.integers(0, 40),
    E=st.integers(1, 6),
    S=st.integers(1, 40),
    D=st.integers(1, 80),
    activation=st.sampled_from(list(ACTIVATIONS)),
    gated=st.booleans(),
    biases=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    poison=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_any_shape(
    backend, tokens, E, S, D, activation, gated, biases, dtype, share, poison, seed, make_weights, assert_agrees
):
    torch.manual_seed(seed)
    weights = make_weights(E, S, D, activation, gated, biases, dtype)
    x_ND = torch.randn(tokens, D).to(dtype)
    mask_NE = torch.rand(tokens, E) < share
    expected = run_reference(x_ND, mask_NE, weights)
    # what no token selected holds nothing but NaN, or infinities, and nothing of it may be seen
    unused_E = ~mask_NE.any(dim=0)
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if field.name != "down_bias_D" and isinstance(tensor, torch.Tensor):
            tensor[unused_E] = poison
    assert_agrees(BACKENDS[backend](x_ND, mask_NE, weights), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend, dtype, make_weights, assert_agrees):
    weights = make_weights(6, 8, 48, gated=True, biases=True, dtype=DTYPES[dtype])
    x_ND = torch.randn(40, 48).to(DTYPES[dtype])
    mask_NE = torch.rand(40, 6) > 0.5
    whole_ND = BACKENDS[backend](x_ND, mask_NE, weights)
    x_ND[20:] = torch.nan  # neither do what others hold
    assert_agrees(BACKENDS[backend](x_ND, mask_NE, weights)[:20], whole_ND[:20])
    for i in range(20):
        alone_1D = BACKENDS[backend](x_ND[i : i + 1], mask_NE[i : i + 1], weights)
        if backend in ("few", "many"):
            assert alone_1D.equal(whole_ND[i : i + 1])
        else:
            assert_agrees(alone_1D, whole_ND[i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_that_is_not_finite_spoils_only_tokens_that_selected_it(backend, make_weights, assert_agrees):
    weights = make_weights(6, 8, 48, gated=True, biases=True)
    x_ND, mask_NE = torch.randn(40, 48), torch.rand(40, 6) > 0.5
    expected = run_reference(x_ND, mask_NE, weights)
    weights.down_ESD[2] = torch.nan
    actual = BACKENDS[backend](x_ND, mask_NE, weights)
    assert_agrees(actual[~mask_NE[:, 2]], expected[~mask_NE[:, 2]])
    assert actual[mask_NE[:, 2]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, make_weights, assert_agrees):
    weights = make_weights(4, 8, 20, gated=True, biases=True)
    strided = replace(weights, up_ESD=torch.randn(8, 4, 20).transpose(0, 1), down_ESD=torch.randn(4, 20, 8).mT)
    x_ND = torch.randn(20, 9).T
    mask_NE = (torch.rand(4, 18) > 0.5).T[::2]
    assert_agrees(BACKENDS[backend](x_ND, mask_NE, strided), run_reference(x_ND, mask_NE, strided))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, make_weights):
    weights = make_weights(4, 8, 20, gated=True, biases=True)
    x_ND, mask_NE = torch.randn(5, 20), torch.rand(5, 4) > 0.5
    before = [t.clone() for t in (x_ND, mask_NE, weights.up_ESD, weights.down_ESD)]
    BACKENDS[backend](x_ND, mask_NE, weights)
    assert all(t.equal(b) for t, b in zip((x_ND, mask_NE, weights.up_ESD, weights.down_ESD), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["few", "many"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_infinite_activations(way, activation, dtype, make_weights):
    """Saturated arguments, infinities and NaN come out as the oracle's."""
    weights = make_weights(1, 16, 16, activation, dtype=DTYPES[dtype])
    weights.up_ESD.copy_(torch.eye(16))
    weights.down_ESD.copy_(torch.eye(16))
    values = [0.0, -0.0, 1e-3, -1e-3, 1, -1, 5, -5, 12, -12, 90, -90, 300, -300, 6e4, -6e4]
    x_ND = torch.tensor([values]).to(DTYPES[dtype])
    mask_NE = torch.ones(1, 1, dtype=torch.bool)
    expected = run_reference(x_ND, mask_NE, weights)
    torch.testing.assert_close(BACKENDS[way](x_ND, mask_NE, weights), expected, rtol=1e-2, atol=1e-6)
    x_ND[0, 3] = torch.nan
    assert BACKENDS[way](x_ND, mask_NE, weights).isnan().all()

import pytest
import torch
from torch.nn import functional

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.reference import run_reference

E, S, D, N = 3, 4, 10, 5


def make_weights(gated, biases, activation):
    torch.manual_seed(0)
    bias = {"up_bias_ES": torch.randn(E, S), "down_bias_D": torch.randn(D)} if biases else {}
    if gated:
        bias = bias | {"gate_ESD": torch.randn(E, S, D)} | ({"gate_bias_ES": torch.randn(E, S)} if biases else {})
    return ExpertWeights(torch.randn(E, S, D), torch.randn(E, S, D), activation, **bias)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_masked_dense_ffn(gated, biases, activation):
    weights = make_weights(gated, biases, activation)
    x_ND = torch.randn(N, D)
    mask_NE = torch.rand(N, E) > 0.5
    mask_NE[0] = False

    def linear(weight_ESD, bias_ES):
        return functional.linear(x_ND, weight_ESD.flatten(0, 1), None if bias_ES is None else bias_ES.flatten())

    hidden_NF = linear(weights.up_ESD, weights.up_bias_ES)
    if gated:
        hidden_NF = ACTIVATIONS[activation](linear(weights.gate_ESD, weights.gate_bias_ES)) * hidden_NF
    else:
        hidden_NF = ACTIVATIONS[activation](hidden_NF)
    expected_ND = (hidden_NF * mask_NE.repeat_interleave(S, dim=1)) @ weights.down_ESD.flatten(0, 1)
    if biases:
        expected_ND += weights.down_bias_D
    torch.testing.assert_close(run_reference(x_ND, mask_NE, weights), expected_ND)


def test_reads_no_expert_that_no_token_selected():
    weights = make_weights(gated=True, biases=True, activation="silu")
    for tensor in (weights.up_ESD, weights.gate_ESD, weights.down_ESD, weights.up_bias_ES, weights.gate_bias_ES):
        tensor[1] = torch.nan
    mask_NE = torch.ones(N, E, dtype=torch.bool)
    mask_NE[:, 1] = False
    assert run_reference(torch.randn(N, D), mask_NE, weights).isfinite().all()


def test_refuses_weights_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"down_ESD has shape \(3, 10, 4\), expected \(3, 4, 10\) as in up_ESD"):
        ExpertWeights(torch.randn(E, S, D), torch.randn(E, D, S), "relu")
    with pytest.raises(ValueError, match="unknown activation 'tanh'; there are relu, gelu, gelu_tanh, silu"):
        ExpertWeights(torch.randn(E, S, D), torch.randn(E, S, D), "tanh")

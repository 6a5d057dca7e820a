import math

import pytest
import torch

from lte_lightning.selection import SELECTORS, FfnShape

D, E, N, K = 8, 6, 40, 3
KINDS = ["softmax", "sigmamoe"]


@pytest.fixture
def x_ND():
    return torch.randn(N, D)


@pytest.fixture
def made():
    """`made(name)`: gates with weights that hide nothing, in train mode."""

    def made(name, sparsity=0.5):
        gates = SELECTORS[name](FfnShape(D, E), sparsity, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in gates.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        return gates.train()

    return made


def naive(logits_NE, gate):
    """The definition, one token after the other: `gate` maps the logits that are kept to their gates."""
    gates_NE = torch.zeros_like(logits_NE)
    for row_E, logits_E in zip(gates_NE, logits_NE, strict=True):
        kept = sorted(range(E), key=lambda e, logits_E=logits_E: -float(logits_E[e]))[:K]
        for e, value in zip(kept, gate([float(logits_E[e]) for e in kept]), strict=True):
            row_E[e] = value
    return gates_NE


def softmax(values):
    exps = [math.exp(value - max(values)) for value in values]
    return [one / sum(exps) for one in exps]


def sigmoid(values):
    return [1 / (1 + math.exp(-value)) for value in values]


GATE = {"softmax": softmax, "sigmamoe": sigmoid}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["eval mode", "frozen"])
def test_the_gates_of_the_top_experts_without_noise(name, how, made, x_ND):
    gates = made(name).eval() if how == "eval mode" else made(name).requires_grad_(False)
    expected_NE = naive((x_ND @ gates.weight.T).detach(), GATE[name])
    torch.testing.assert_close(gates(x_ND), expected_NE)
    assert gates(x_ND).equal(gates(x_ND))
    assert int((gates(x_ND) > 0).sum()) == N * K


def test_softmax_noise_while_it_learns(made, x_ND):
    gates = made("softmax")
    torch.manual_seed(3)
    found_NE = gates(x_ND)
    torch.manual_seed(3)
    spread_NE = torch.log1p(torch.exp(x_ND @ gates.noise_weight.T))
    expected_NE = naive((x_ND @ gates.weight.T + spread_NE * torch.randn(N, E)).detach(), softmax)
    torch.testing.assert_close(found_NE, expected_NE)
    torch.testing.assert_close(found_NE.sum(1), torch.ones(N))


def test_sigma_moe_drops_experts_while_it_learns(made, x_ND):
    gates = made("sigmamoe")
    gates.dropout = 0.3
    torch.manual_seed(3)
    found_NE = gates(x_ND)
    torch.manual_seed(3)
    dropped_NE = torch.rand(N, E) < 0.3
    assert dropped_NE.any()
    sigmoid_NE = (x_ND @ gates.weight.T).sigmoid().masked_fill(dropped_NE, 0.0)
    kept_NE = torch.zeros(N, E).scatter(1, sigmoid_NE.topk(K).indices, 1.0)
    torch.testing.assert_close(found_NE, sigmoid_NE * kept_NE)  # not scaled up, not renormalised


def test_dropping_them_all_runs_none(made, x_ND):
    gates = made("sigmamoe")
    gates.dropout = 1.0
    found_NE = gates(x_ND)
    found_NE.sum().backward()
    assert found_NE.equal(torch.zeros(N, E))
    assert gates.weight.grad.equal(torch.zeros(E, D))


def test_importance_loss(made, x_ND):
    gates = made("softmax")
    gates_NE = gates(x_ND).detach()
    sums = [sum(float(row_E[e]) for row_E in gates_NE) for e in range(E)]
    mean = sum(sums) / E
    expected = sum((one - mean) ** 2 for one in sums) / E / mean**2
    assert gates.balance_loss(x_ND, gates_NE).item() == pytest.approx(expected, rel=1e-4)
    assert gates.balance_loss(x_ND, torch.ones(N, E)).item() == 0.0


def test_entropy_of_the_mean_choice(made, x_ND):
    gates = made("sigmamoe")
    rows = [softmax(logits_E.tolist()) for logits_E in (x_ND @ gates.weight.T).detach()]
    shares = [sum(row[e] for row in rows) / N for e in range(E)]
    expected = sum(share * math.log(share) for share in shares)
    assert gates.balance_loss(x_ND, gates(x_ND)).item() == pytest.approx(expected, rel=1e-4)
    gates.weight.data.zero_()
    assert gates.balance_loss(x_ND, gates(x_ND)).item() == pytest.approx(-math.log(E), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_gets_a_gradient(name, made, x_ND):
    gates = made(name)
    gates_NE = gates(x_ND)
    (gates_NE.square().sum() + gates.balance_loss(x_ND, gates_NE)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in gates.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_descent_evens_the_load_out(name, made, x_ND):
    gates = made(name)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.02)

    def loss():
        return gates.balance_loss(x_ND, gates(x_ND))

    before = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before - 0.05


def test_where_they_start():
    softmax, sigma = (SELECTORS[name](FfnShape(D, E), 0.5, torch.Generator().manual_seed(0)) for name in KINDS)
    assert all(parameter.equal(torch.zeros(E, D)) for parameter in softmax.parameters())
    torch.testing.assert_close(sigma.weight.norm(dim=1), torch.ones(E))
    again = SELECTORS["sigmamoe"](FfnShape(D, E), 0.5, torch.Generator().manual_seed(0))
    assert again.weight.equal(sigma.weight)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_gives_float32_gates(name, made, x_ND):
    gates = made(name)
    gates_BTE = gates(x_ND.to(torch.bfloat16).view(4, 10, D))
    assert gates_BTE.shape == (4, 10, E)
    assert gates_BTE.dtype == torch.float32
    assert bool((gates_BTE >= 0).all())
    assert bool((gates_BTE <= 1).all())


@pytest.mark.parametrize("name", KINDS)
def test_charges(name, made):
    gates = made(name)
    assert gates.flops_per_token() == 2 * D * E
    assert gates.weights_read() == D * E  # W_noise is not needed to choose

import pytest
import torch

from lte_lightning.selection import SELECTORS, Activity, FfnShape
from lte_lightning.selection.d2dmoe import D2dmoe
from lte_lightning.selection.dejavu import DejaVu
from lte_lightning.selection.moefication import Moefication

D, F, E, N = 8, 24, 6, 40
SHAPE = FfnShape(D, E)
SPARSITY = 0.5  # keeps 3 of 6


def made(name, sparsity=SPARSITY, shape=SHAPE):
    return SELECTORS[name](shape, sparsity, torch.Generator().manual_seed(0))


def given(name):
    torch.manual_seed(1)
    return torch.randn(N, D if made(name).reads == "input" else F)


def top(importance_NE, count):
    """The definition, one token after the other."""
    kept = torch.zeros_like(importance_NE)
    for row, importance_E in zip(kept, importance_NE, strict=True):
        for e in sorted(range(E), key=lambda e, row=importance_E: -float(row[e]))[:count]:
            row[e] = 1.0
    return kept


def mass(hidden_NF):
    return torch.stack([hidden_NF[:, e * 4 : e * 4 + 4].abs().sum(1) for e in range(E)], 1)


def test_kla_keeps_the_largest_activations_of_each_token():
    hidden_NF = given("kla")
    assert made("kla")(hidden_NF).equal(top(mass(hidden_NF), 3))


def test_cats_keeps_what_lies_above_a_quantile_of_the_training_rows():
    cats, gate_NF = made("cats"), given("cats")
    assert bool((cats(gate_NF) == 1).all())  # not calibrated
    cats.calibrate(cats.importance(gate_NF))
    level = mass(gate_NF).flatten().sort().values[N * E // 2 - 1]
    assert cats(gate_NF).equal((mass(gate_NF) > level).float())
    assert float(cats(gate_NF).mean()) == pytest.approx(SPARSITY)
    assert cats.whole_projections() == 1


def test_narrow_keeps_the_same_experts_for_every_token():
    narrow, hidden_NF = made("narrow"), given("narrow")
    narrow.calibrate(narrow.importance(hidden_NF))
    best = mass(hidden_NF).mean(0).topk(3).indices
    expected_E = torch.zeros(E).index_fill_(0, best, 1.0)
    assert narrow(torch.randn(2, 5, F)).equal(expected_E.expand(2, 5, E))


def test_random_routers_rank_by_a_map_that_is_not_trained():
    router, x_ND = made("random"), given("random")
    assert not list(router.parameters())
    assert router(x_ND).equal(top(x_ND @ router.weight.T, 3))


def test_deja_vu_keeps_the_top():
    predictor, x_ND = made("dejavu"), given("dejavu")
    predicted_NE = x_ND @ predictor.first.T @ predictor.second.T
    assert predictor(x_ND).equal(top(predicted_NE.detach(), 3))


def test_moefication_keeps_the_top_of_a_network_that_sees_the_direction():
    predictor, x_ND = made("moefication"), given("moefication")
    assert predictor.second.equal(torch.eye(E))
    with torch.no_grad():
        predictor.second.normal_()
    predicted_NE = torch.tanh(x_ND / x_ND.norm(dim=1, keepdim=True) @ predictor.first.T) @ predictor.second.T
    assert predictor(x_ND).equal(top(predicted_NE.detach(), 3))
    assert predictor(7 * x_ND).equal(predictor(x_ND))


def test_d2dmoe_keeps_what_comes_near_the_token_s_largest():
    d2dmoe, x_ND = made("d2dmoe"), given("d2dmoe")
    norms_NE = (torch.relu(x_ND @ d2dmoe.first.T) @ d2dmoe.second.T).abs().detach()
    shares_NE = norms_NE / norms_NE.max(1, keepdim=True).values
    assert bool((d2dmoe(x_ND) == 1).all())  # not calibrated
    d2dmoe.set_common_level(0.3)
    assert d2dmoe(x_ND).equal((shares_NE >= 0.3).float())
    d2dmoe.set_common_level(1.0)  # the authors' tau 0
    assert d2dmoe(x_ND).equal(top(shares_NE, 1))


def test_d2dmoe_runs_all_experts_of_a_token_that_it_predicts_nothing_of():
    d2dmoe, x_ND = made("d2dmoe"), given("d2dmoe")
    d2dmoe.set_common_level(0.9)
    d2dmoe.first.data.zero_()
    assert bool((d2dmoe(x_ND) == 1).all())


def seen(x_ND, hidden_NF, down_FD, first_FD=None):
    first_FD = torch.randn(F, D) if first_FD is None else first_FD
    return Activity(x_ND, hidden_NF, hidden_NF, first_FD, down_FD)


def test_losses_are_their_definitions():
    torch.manual_seed(2)
    x_ND, hidden_NF, down_FD = torch.randn(N, D), torch.randn(N, F), torch.randn(F, D)
    activity = seen(x_ND, hidden_NF, down_FD)
    mass_NE = mass(hidden_NF)

    moefication = made("moefication")
    share_NE, predicted_NE = mass_NE / mass_NE.max(), moefication.predict(x_ND).sigmoid()
    expected = -(share_NE * predicted_NE.log() + (1 - share_NE) * (1 - predicted_NE).log()).mean()
    torch.testing.assert_close(moefication.imitation_loss(activity), expected)

    dejavu = made("dejavu")
    expected = (dejavu.predict(x_ND) - mass_NE / mass_NE.mean()).square().mean()
    torch.testing.assert_close(dejavu.imitation_loss(activity), expected)

    d2dmoe = made("d2dmoe")
    outputs = [hidden_NF[:, e * 4 : e * 4 + 4] @ down_FD[e * 4 : e * 4 + 4] for e in range(E)]
    norm_NE = torch.stack([output.norm(dim=1) for output in outputs], 1)
    expected = (d2dmoe.predict(x_ND) - norm_NE).square().mean()
    torch.testing.assert_close(d2dmoe.imitation_loss(activity), expected)


def test_losses_with_relu_are_the_authors():
    torch.manual_seed(2)
    x_ND, up_FD = 3 * torch.randn(N, D), torch.randn(F, D)
    up_FD[:8] -= 2.0  # or every expert would have an active neuron
    hidden_NF = (x_ND @ up_FD.T - 4.0).relu()
    activity, relu = seen(x_ND, hidden_NF, torch.randn(F, D), up_FD), FfnShape(D, E, activation="relu")

    moefication = made("moefication", shape=relu)
    mass_NE = mass((x_ND / x_ND.norm(dim=1, keepdim=True) @ up_FD.T).relu())  # no bias, and no length
    share_NE, predicted_NE = mass_NE / mass_NE.max(), moefication.predict(x_ND).sigmoid()
    expected = -(share_NE * predicted_NE.log() + (1 - share_NE) * (1 - predicted_NE).log()).mean()
    torch.testing.assert_close(moefication.imitation_loss(activity), expected)

    dejavu = made("dejavu", shape=relu)
    losses, active = [], [[float(value) > 0 for value in row] for row in mass(hidden_NF)]
    share = sum(map(sum, active)) / (N * E) + 0.005
    assert 0.1 < share < 0.9
    for row, predicted_E in zip(active, dejavu.predict(x_ND).sigmoid(), strict=True):
        for is_active, predicted in zip(row, predicted_E, strict=True):
            losses.append(-predicted.log() if is_active else -share * (1 - predicted).log())
    torch.testing.assert_close(dejavu.imitation_loss(activity), torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["d2dmoe", "dejavu"])
def test_a_model_saved_with_a_bias_keeps_it(name):
    """As they were written until 26 November 2026."""
    old, x_ND = made(name), given(name)
    stored = old.state_dict() | {"bias": torch.randn(E)}
    loaded = made(name)
    loaded.load_state_dict(stored)
    inner_NI = x_ND @ loaded.first.T
    inner_NI = inner_NI.relu() if name == "d2dmoe" else inner_NI
    expected_NE = inner_NI @ loaded.second.T + stored["bias"]
    torch.testing.assert_close(loaded.predict(x_ND), expected_NE.abs() if name == "d2dmoe" else expected_NE)
    assert loaded.state_dict().keys() == stored.keys()
    assert loaded.bias.requires_grad
    assert "bias" not in made(name).state_dict()


@pytest.mark.parametrize("kind", [Moefication, DejaVu, D2dmoe])
def test_predictors_learn(kind):
    """On activations that depend on the input the trained ranking finds more of the mass than the untrained one."""
    torch.manual_seed(3)
    x_ND, down_FD = torch.randn(400, D), torch.randn(F, D)
    hidden_NF = (x_ND @ torch.randn(D, F)).relu() ** 2
    predictor = kind(SHAPE, SPARSITY, torch.Generator().manual_seed(0))

    def found():
        kept_NE = top(predictor.importance(x_ND).detach(), 3)
        return float((kept_NE * mass(hidden_NF)).sum() / mass(hidden_NF).sum())

    before = found()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        predictor.imitation_loss(seen(x_ND, hidden_NF, down_FD)).backward()
        optimizer.step()
    assert found() > max(before, 0.5) + 0.1


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("kla", 0),
        ("cats", 0),
        ("narrow", 0),
        ("none", 0),
        ("random", 2 * D * E),
        ("moefication", 2 * (D * E + E * E)),
        ("dejavu", 2 * (D + E)),
        ("d2dmoe", 2 * (D * 128 + 128 * E)),
        ("teal", 0),
        ("wanda", 0),
    ],
)
def test_charges(name, flops):
    assert made(name).flops_per_token() == flops


@pytest.mark.parametrize("name", [name for name, kind in SELECTORS.items() if not kind.graded])
def test_scores_are_zero_or_one_and_half_precision_is_taken(name):
    selector = made(name)
    scores = selector(given(name).to(torch.bfloat16).view(4, 10, -1))
    assert scores.shape == (4, 10, E)
    assert scores.dtype == torch.float32
    assert set(scores.unique().tolist()) <= {0.0, 1.0}

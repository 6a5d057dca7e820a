import math

import pytest
import torch

from lte_lightning.core.routing.losses import SEPARABILITY_EPSILON, efficiency_loss, separability_loss


def test_efficiency_by_hand():
    # Layer means: (0 + 1 + 0.25 + 0.25) / 4 = 0.375, and 0.04.
    layers = [torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.2]])]
    assert float(efficiency_loss(layers)) == pytest.approx((0.375 + 0.04) / 2)
    assert float(efficiency_loss([torch.ones(5, 3)])) == 1.0


def test_separability_by_hand():
    layers = [torch.tensor([[0.5, 0.6]]), torch.tensor([[0.0], [1.0]])]
    # 1 / 0.01 and 1 / (0.01 + 0.01); twice 1 / (0.25 + 0.01).
    assert float(separability_loss(layers, 0.5)) == pytest.approx(((100 + 50) / 2 + 1 / 0.26) / 2)
    assert float(separability_loss([torch.tensor([[0.1]])], 0.3, epsilon=0.06)) == pytest.approx(10)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_separability_floor(score):
    assert float(separability_loss([torch.tensor([[score]])], 0.5)) == pytest.approx(3.846, abs=5e-4)


def test_separability_is_least_at_the_ends_and_capped():
    losses = [float(separability_loss([score.view(1, 1)], 0.5)) for score in torch.linspace(0, 1, 101)]
    assert min(losses) == losses[0]
    assert max(losses) == losses[50] == pytest.approx(100)


def test_separability_gradient_is_bounded_as_documented():
    assert SEPARABILITY_EPSILON == 0.01
    scores = torch.linspace(0, 1, 10_001, requires_grad=True)
    (gradient,) = torch.autograd.grad(separability_loss([scores[:, None]], 0.5) * len(scores), scores)
    distance = abs(float(scores.detach()[gradient.abs().argmax()]) - 0.5)
    assert 645 < float(gradient.abs().max()) <= 650
    assert distance == pytest.approx(0.058, abs=5e-4)
    assert distance == pytest.approx(math.sqrt(SEPARABILITY_EPSILON / 3), abs=1e-4)


def test_gradient_on_the_threshold_is_finite_and_zero():
    scores = torch.full((2, 3), 0.5, requires_grad=True)
    loss = separability_loss([scores], 0.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(100)
    assert scores.grad.equal(torch.zeros(2, 3))


def test_gradients_push_scores_down_and_apart():
    scores = torch.tensor([[0.4, 0.6]], requires_grad=True)
    (down,) = torch.autograd.grad(efficiency_loss([scores]), scores)
    (apart,) = torch.autograd.grad(separability_loss([scores], 0.5), scores)
    assert (down > 0).all()
    assert apart[0, 0] > 0 > apart[0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32(dtype):
    scores = [torch.rand(64, 96).to(dtype), torch.rand(64, 96).to(dtype)]
    exact = [layer.float() for layer in scores]
    for loss in (efficiency_loss, lambda layers: separability_loss(layers, 0.5)):
        assert loss(scores).dtype == torch.float32
        assert loss(scores).equal(loss(exact))


@pytest.mark.parametrize(("loss", "more"), [(efficiency_loss, ()), (separability_loss, (0.5,))])
def test_a_layer_s_weight_multiplies_its_mean(loss, more):
    layers = [torch.tensor([[0.2, 0.9]]), torch.tensor([[0.4]])]
    first, second = (float(loss([layer], *more)) for layer in layers)
    weighted = loss(layers, *more, weights_L=torch.tensor([3.0, 0.5]))
    assert float(weighted) == pytest.approx((3 * first + 0.5 * second) / 2)

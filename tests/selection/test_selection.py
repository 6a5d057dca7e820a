import pytest
import torch

from lte_lightning.selection import FfnShape, NoExperts, Router

LOGIT = {0.3: -0.8473, 0.5: 0.0, 0.7: 0.8473}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rms(tokens, width):
    x_TD = torch.randn(tokens, width, generator=generator(1))
    return x_TD / x_TD.square().mean(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("width", [64, 384, 768, 4096])
def test_every_score_starts_above_the_threshold(width, threshold):
    router = Router(width, 96, threshold, generator=generator())
    scores_TE = router(unit_rms(256, width))
    assert scores_TE.shape == (256, 96)
    assert float(scores_TE.min()) > threshold
    logits_TE = torch.logit(scores_TE)
    assert float(logits_TE.mean()) == pytest.approx(LOGIT[threshold] + 2, abs=0.05)
    assert float(logits_TE.std()) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("width", [64, 4096])
def test_without_a_bias_scores_start_around_a_half(width):
    router = Router(width, 96, threshold=0.3, bias=False, generator=generator())
    scores_TE = router(unit_rms(256, width))
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert float(scores_TE.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(torch.logit(scores_TE).std()) == pytest.approx(0.4, rel=0.05)


def test_margin_and_scale():
    router = Router(64, 8, threshold=0.7, margin=-1.0, scale=0.1, generator=generator())
    logits_TE = torch.logit(router(unit_rms(256, 64)))
    assert float(logits_TE.mean()) == pytest.approx(LOGIT[0.7] - 1, abs=0.05)
    assert float(logits_TE.std()) == pytest.approx(0.1, rel=0.15)


def test_equals_equation_1():
    router = Router(5, 3, generator=generator())
    router.bias.data = torch.tensor([0.5, -1.0, 0.0])
    x_BTD = torch.randn(2, 4, 5)
    for b in range(2):
        for t in range(4):
            for expert in range(3):
                logit = sum(float(x_BTD[b, t, d]) * float(router.weight[expert, d]) for d in range(5))
                expected = torch.tensor(logit + float(router.bias[expert])).sigmoid()
                assert float(router(x_BTD)[b, t, expert]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router_dtype", [torch.float32, None])
def test_half_precision_input_gives_float32_scores(dtype, router_dtype):
    router = Router(64, 32, generator=generator()).to(router_dtype or dtype)
    x_TD = unit_rms(50, 64)
    scores = router(x_TD.to(dtype))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, router.float()(x_TD), rtol=0.02, atol=0.01)


def test_the_sigmoid_is_taken_in_float32():
    # A sigmoid in bfloat16 has steps of 2^-9 below one half and rounds this logit onto the threshold.
    router = Router(1, 1, bias=False).to(torch.bfloat16)
    router.weight.data.fill_(1.0)
    tiny = torch.tensor([[2.0**-12]], dtype=torch.bfloat16)
    assert float(torch.sigmoid(tiny)) == 0.5
    assert float(router(tiny)) > 0.5


def test_the_generator_decides_the_weights():
    first, second, other = (Router(8, 4, generator=generator(seed)).weight for seed in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


def test_no_experts():
    none = NoExperts(FfnShape(8, 6), 1.0)
    scores = none(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert scores.equal(torch.zeros(2, 3, 6))
    assert scores.dtype == torch.float32
    assert not list(none.parameters())
    assert none.flops_per_token() == 0

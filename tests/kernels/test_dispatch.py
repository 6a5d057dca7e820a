import pytest
import torch

from lte_lightning.kernels import dispatch
from lte_lightning.kernels.dispatch import BACKENDS, choose, run_experts
from lte_lightning.kernels.reference import run_reference

X = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference"), ("dense-mask", "dense-mask")],
)
def test_on_a_cpu(backend, expected):
    assert choose(backend, X, X) == dispatch.Choice(expected)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "dense-mask"])
def test_every_fallback_says_why(backend):
    for x, weight, gradient, why in (
        (X, X, True, "a gradient may be needed"),
        (X, X.half(), False, "input and weights differ in type (torch.float32, torch.float16)"),
        (X.double(), X.double(), False, "torch.float64"),
    ):
        choice = choose(backend, x, weight, gradient)
        if choice.backend == "dense-mask":
            assert why in choice.fallback
        else:  # the oracle computes in any type
            assert (backend, choice.backend) == ("reference", "reference")
    with torch.autocast("cpu", torch.bfloat16):
        why = "autocast computes in torch.bfloat16, the weights are torch.float16"
        assert choose(backend, X, X.half()) == dispatch.Choice("dense-mask", why)


@pytest.mark.parametrize("weight", [X, X.bfloat16()])
@pytest.mark.parametrize("x", [X, X.bfloat16()])
def test_autocast_keeps_nothing_from_being_sparse(x, weight):
    with torch.autocast("cpu", torch.bfloat16):
        assert choose("auto", x, weight) == dispatch.Choice("cpu")
        assert choose("reference", x, weight) == dispatch.Choice("reference")
        assert choose("auto", x, weight, gradient=True).backend == "dense-mask"


@pytest.mark.parametrize("tokens", [1, 128, 129, 513])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["dense-mask", "reference", "cpu"])
def test_agrees_with_the_oracle_under_autocast(backend, dtype, x_dtype, tokens, make_weights, assert_agrees):
    weights = make_weights(5, 24, 70, gated=True, biases=True)
    x_ND, mask_NE = torch.randn(tokens, 70).to(x_dtype), torch.rand(tokens, 5) > 0.5
    mask_NE[:, 2] = False
    expected = run_reference(x_ND.to(dtype), mask_NE, weights.to(dtype))
    weights.down_ESD[2] = torch.nan
    with torch.autocast("cpu", dtype):
        actual = run_experts(backend, x_ND, mask_NE, weights)
        assert torch.is_autocast_enabled("cpu")
    assert actual.dtype == dtype
    assert_agrees(actual, expected)


@pytest.mark.parametrize("tokens", [128, 129])
def test_few_tokens_under_autocast_read_the_weights_in_place(tokens, make_weights, monkeypatch):
    given = []
    monkeypatch.setattr(dispatch, "run_cpu", lambda x, mask, weights: given.append((x, weights)) or x)
    weights = make_weights(3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        run_experts("cpu", torch.randn(tokens, 12), torch.ones(tokens, 3, dtype=torch.bool), weights)
    ((x_ND, used),) = given
    assert (used is weights) == (tokens == 128)
    assert x_ND.dtype == used.down_ESD.dtype == (torch.float32 if tokens == 128 else torch.bfloat16)


def test_devices_that_a_backend_does_not_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("triton", X, X).fallback == "backend 'triton' does not run on 'cpu' (triton sees no device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose("triton", X, X).fallback == "backend 'triton' does not run on 'cpu'"
    meta = torch.zeros(1, 4, device="meta")
    assert "does not run on 'meta'" in choose("auto", meta, meta).fallback


def test_a_triton_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.why_no_triton() == "triton is not installed"
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.why_no_triton() == "triton sees no device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.why_no_triton() == ""


def test_torch_compile_traces_the_question():
    @torch.compile(fullgraph=True, backend="eager")
    def ask(x):
        return x + len(dispatch.why_no_triton()) + dispatch.is_interpreted()

    assert ask(X).equal(X + len(dispatch.why_no_triton()) + dispatch.is_interpreted())


@pytest.mark.parametrize("backend", ["dense-mask", "reference", "cpu"])
def test_runs_what_was_chosen(backend, make_weights, assert_agrees):
    weights = make_weights(3, 8, 12, gated=True)
    x_ND, mask_NE = torch.randn(5, 12), torch.rand(5, 3) > 0.5
    assert_agrees(run_experts(backend, x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (
            torch.zeros(2, 12),
            torch.ones(2, 4, dtype=torch.bool),
            r"torch.bool of shape \(2, 4\), expected .* for 2 tok",
        ),
        (torch.zeros(2, 12), torch.ones(3, 3, dtype=torch.bool), r"of shape \(3, 3\)"),
        (torch.zeros(2, 12), torch.ones(2, 3), "the mask is torch.float32"),
        (torch.zeros(2, 11), torch.ones(2, 3, dtype=torch.bool), r"\(2, 11\), expected \[N, 12\]"),
        (torch.zeros(1, 2, 12), torch.ones(2, 3, dtype=torch.bool), r"\(1, 2, 12\)"),
    ],
)
@pytest.mark.parametrize("backend", ["dense-mask", "reference", "cpu"])
def test_refuses_what_does_not_fit(backend, x, mask, message, make_weights):
    with pytest.raises(ValueError, match=message):
        run_experts(backend, x, mask, make_weights(3, 8, 12))

"""The Triton kernels against the oracle: on a GPU (nox -s gpu), or in the interpreter (test_triton_interpreted.py)."""

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

pytest.importorskip("triton", reason="triton is not installed")

from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights
from lte_lightning.kernels.reference import run_reference
from lte_lightning.kernels.triton.common import INTERPRETED
from lte_lightning.kernels.triton.ffn import run_triton
from lte_lightning.kernels.triton.lists import choose_form, list_active, list_groups
from lte_lightning.kernels.triton.prefill import FEW, GROUPED, GROUPED_COST_16THS, UNION
from lte_lightning.kernels.triton.router import MAX_TOKENS, route_triton
from lte_lightning.selection import Router

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET is not 1"
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTORS = {
    "dtype": DTYPES,
    "gated": (False, True),
    "biases": (False, True),
    "activation": tuple(ACTIVATIONS),
    "selection": ("none", "one", "few", "some", "most", "all"),
    "N": (1, 2, 7, FEW["BLOCK_M"], 513),
    # F is a power of two in one of them only; D is a multiple of no tile in the others.
    "shape": ((8, 4, 16), (5, 6, 20), (3, 32, 136), (9, 1, 7)),
}


def covering(factors, strength):
    """Rows in which every combination of values of every `strength` factors occurs, chosen greedily."""

    def combinations(row):
        return set(itertools.combinations(row.items(), strength))

    everything = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    wanted = set().union(*map(combinations, everything))
    generator = torch.Generator().manual_seed(0)
    rows = []
    while wanted:
        sample = torch.randint(len(everything), (200,), generator=generator).tolist()
        best = max((everything[i] for i in sample), key=lambda row: len(combinations(row) & wanted))
        if combinations(best) & wanted:
            rows.append(best)
            wanted -= combinations(best)
    return rows


CASES = covering(FACTORS, 2)


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """With this torch.empty is full of NaN, and of the largest integer, which is no expert."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_weights(dtype, shape, gated=True, biases=True, activation="silu"):
    E, S, D = shape

    def draw(*size, scale=1.0):
        return (torch.randn(size) * scale).to(dtype).to(DEVICE)

    up_ESD, down_ESD = draw(E, S, D, scale=D**-0.5), draw(E, S, D, scale=(E * S) ** -0.5)
    gate_ESD = draw(E, S, D, scale=D**-0.5) if gated else None
    bias = (draw(E, S), draw(E, S) if gated else None, draw(D)) if biases else (None, None, None)
    return ExpertWeights(up_ESD, down_ESD, activation, gate_ESD, *bias)


def make_mask(selection, N, E):
    shares = {"none": 0.0, "one": 0.0, "few": 0.1, "some": 0.5, "most": 0.9, "all": 1.0}
    mask_NE = torch.rand(N, E) < shares[selection]
    if selection == "one":
        mask_NE[:, E // 2] = True
    return mask_NE.to(DEVICE)


def poison(weights, mask_NE):
    """Puts NaN wherever no token's selection needs a number."""
    idle_E = ~mask_NE.any(dim=0)
    for tensor in (
        weights.up_ESD, weights.gate_ESD, weights.down_ESD, weights.up_bias_ES, weights.gate_bias_ES
    ):  # fmt: skip
        if tensor is not None:
            tensor[idle_E] = torch.nan


def assert_equal_to_rounding(actual, expected):
    # Sums in another order, and the hidden activations rounded to the weights' type, as in the dense FFN.
    steps = {torch.float32: 16, torch.bfloat16: 3, torch.float16: 3}[expected.dtype]
    error = steps * torch.finfo(expected.dtype).eps
    scale = max(1.0, expected.float().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=error, atol=error * scale)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_equals_the_oracle(case):
    E, _, D = case["shape"]
    weights = make_weights(case["dtype"], case["shape"], case["gated"], case["biases"], case["activation"])
    mask_NE = make_mask(case["selection"], case["N"], E)
    poison(weights, mask_NE)
    x_ND = torch.randn(case["N"], D).to(case["dtype"]).to(DEVICE)
    y_ND = run_triton(x_ND, mask_NE, weights)
    assert y_ND.dtype == x_ND.dtype
    assert y_ND.isfinite().all()
    assert_equal_to_rounding(y_ND, run_reference(x_ND, mask_NE, weights))


def test_the_cases_cover_what_they_should():
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


@settings(max_examples=15)
@given(
    N=st.integers(0, 140),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(1, 70)),
    share=st.sampled_from((0.02, 0.3, 0.9)),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
@example(N=3, shape=(1100, 1, 3), share=0.02, gated=True, dtype=torch.float32, seed=0)  # more experts than a block
@example(N=2, shape=(2, 80, 9), share=0.9, gated=True, dtype=torch.bfloat16, seed=0)  # experts wider than a tile
@example(N=70, shape=(2, 80, 9), share=0.9, gated=True, dtype=torch.bfloat16, seed=0)
@example(N=70, shape=(20, 4, 9), share=0.9, gated=False, dtype=torch.float16, seed=0)
def test_equals_the_oracle_for_any_shape(N, shape, share, gated, dtype, seed):
    torch.manual_seed(seed)
    weights = make_weights(dtype, shape, gated)
    mask_NE = (torch.rand(N, shape[0]) < share).to(DEVICE)
    poison(weights, mask_NE)
    x_ND = torch.randn(N, shape[2]).to(dtype).to(DEVICE)
    assert_equal_to_rounding(run_triton(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("selection", "form"), [("few", 1), ("most", 0)])
def test_both_forms_of_prefill(selection, form, dtype, gated):
    weights = make_weights(dtype, (5, 6, 20), gated)
    x_ND, mask_NE = torch.randn(300, 20).to(dtype).to(DEVICE), make_mask(selection, 300, 5)
    mask_NE[:, 3] = False
    poison(weights, mask_NE)
    _, count_M = list_active(mask_NE.view(torch.uint8), UNION["BLOCK_M"])
    _, count_E = list_groups(mask_NE.view(torch.uint8))
    assert choose_form(count_E, count_M, GROUPED["BLOCK_M"], GROUPED_COST_16THS).item() == form
    assert_equal_to_rounding(run_triton(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [2, 7, 64, 513])
def test_a_row_of_a_batch_equals_the_row_alone(N, dtype):
    weights = make_weights(dtype, (5, 6, 20))
    x_ND, mask_NE = torch.randn(N, 20).to(dtype).to(DEVICE), make_mask("some", N, 5)
    y_ND = run_triton(x_ND, mask_NE, weights)
    for i in {0, 1, N // 2, N - 1}:
        assert_equal_to_rounding(run_triton(x_ND[i : i + 1], mask_NE[i : i + 1], weights), y_ND[i : i + 1])


@pytest.mark.parametrize("N", [1, 7, 65])
def test_inputs_of_any_strides(N):
    weights = make_weights(torch.float32, (5, 6, 20))
    x_ND, mask_NE = torch.randn(20, 2 * N).to(DEVICE).t()[::2], (torch.rand(5, N) < 0.5).t().to(DEVICE)
    assert not x_ND.is_contiguous()
    assert N == 1 or not mask_NE.is_contiguous()
    assert_equal_to_rounding(run_triton(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


@pytest.mark.parametrize("N", [1, 7, 200])
def test_the_same_input_gives_the_same_bits(N):
    weights = make_weights(torch.float32, (9, 6, 20))
    x_ND, mask_NE = torch.randn(N, 20).to(DEVICE), make_mask("some", N, 9)
    assert run_triton(x_ND, mask_NE, weights).equal(run_triton(x_ND, mask_NE, weights))


@pytest.mark.parametrize(("N", "tokens"), [(1, 1), (7, 16), (300, 64), (513, 128)])
@pytest.mark.parametrize("selection", FACTORS["selection"])
def test_lists(N, tokens, selection):
    mask_NE = make_mask(selection, N, 37)
    active_ME, count_M = list_active(mask_NE.view(torch.uint8), tokens)
    for m, block_NE in enumerate(mask_NE.split(tokens)):
        assert active_ME[m, : count_M[m]].tolist() == block_NE.any(dim=0).nonzero().flatten().tolist()
    tokens_EN, count_E = list_groups(mask_NE.view(torch.uint8))
    for e in range(37):
        assert tokens_EN[e, : count_E[e]].tolist() == mask_NE[:, e].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("count_E", "count_M", "grouped"),
    # Grouped tiles at 24, union tiles at 16: 2 * 24 < 4 * 16, 3 * 24 > 4 * 16; an expert's last tile counts whole.
    [([8, 8], [2, 2], 1), ([8, 8, 8], [2, 2], 0), ([9, 8], [2, 2], 0), ([0, 0], [0, 0], 0), ([1] * 1100, [1651], 1)],
)
def test_the_cheaper_form_is_chosen(count_E, count_M, grouped):
    counts = [torch.tensor(counts, dtype=torch.int32, device=DEVICE) for counts in (count_E, count_M)]
    assert choose_form(*counts, tokens=8, cost_16ths=24).tolist() == [grouped]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [1, 3, 40, MAX_TOKENS + 1, 0])
def test_router_agrees_with_the_selector(N, bias, dtype):
    router = Router(20, 11, threshold=0.4, bias=bias, margin=0.0, scale=2.0).to(DEVICE)
    x_ND = torch.randn(N, 20).to(dtype).to(DEVICE)
    scores_NE = router(x_ND)
    mask_NE = route_triton(x_ND, router.weight, router.bias, torch.tensor(0.4, device=DEVICE))
    clear_NE = (scores_NE - 0.4).abs() > 2 * torch.finfo(dtype).eps
    assert mask_NE.dtype == torch.bool
    assert (mask_NE == (scores_NE > 0.4))[clear_NE].all()
    assert N == 0 or (clear_NE.float().mean() > 0.9 and 0.2 < mask_NE.float().mean() < 0.9)


def test_refuses_what_it_cannot_compute():
    weights = make_weights(torch.float32, (5, 6, 20))
    x_ND, mask_NE = torch.randn(3, 20).to(DEVICE), make_mask("some", 3, 5)
    turned_ESD = weights.down_ESD.mT.contiguous().mT
    wrong = {
        r"x_ND has shape \(3, 19\), expected \(N, 20\)": (x_ND[:, 1:], mask_NE, weights),
        r"mask_NE has shape \(2, 5\), expected \(3, 5\)": (x_ND, mask_NE[1:], weights),
        "mask_NE is torch.float32, expected torch.bool": (x_ND, mask_NE.float(), weights),
        "takes torch.float32, torch.bfloat16, torch.float16, and x_ND is torch.float64": (
            x_ND.double(),
            mask_NE,
            weights,
        ),
        "up_ESD is torch.float32, and x_ND torch.bfloat16: convert": (x_ND.bfloat16(), mask_NE, weights),
        r"down_ESD has strides \(120, 1, 6\): lay it out": (
            x_ND,
            mask_NE,
            dataclasses.replace(weights, down_ESD=turned_ESD),
        ),
        "up_bias_ES is on meta, and x_ND on": (
            x_ND,
            mask_NE,
            dataclasses.replace(weights, up_bias_ES=weights.up_bias_ES.to("meta")),
        ),
        "mask_NE is on meta, and x_ND on": (x_ND, mask_NE.to("meta"), weights),
    }
    for message, args in wrong.items():
        with pytest.raises(ValueError, match=message):
            run_triton(*args)
    with pytest.raises(ValueError, match=r"weight_ED has strides \(1, 20\): lay it out"):
        route_triton(x_ND, torch.randn(20, 20, device=DEVICE).t(), None, torch.tensor(0.5, device=DEVICE))


def test_compiled_as_one_graph():
    weights = make_weights(torch.float32, (5, 6, 20))
    router, threshold = Router(20, 5, margin=0.0).to(DEVICE), torch.tensor(0.5, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def ffn(x_ND):
        mask_NE = route_triton(x_ND * 2, router.weight.detach(), router.bias.detach(), threshold)
        return run_triton(x_ND * 2, mask_NE, weights) + 1

    for N, level in ((1, 0.5), (3, 0.6), (70, 0.4)):
        threshold.fill_(level)
        x_ND = torch.randn(N, 20, device=DEVICE)
        mask_NE = router(2 * x_ND) > level
        assert_equal_to_rounding(ffn(x_ND), run_reference(2 * x_ND, mask_NE, weights) + 1)


@pytest.mark.parametrize("N", [1, 70])
def test_operators_are_registered_as_torch_wants_it(N):
    weights = make_weights(torch.float32, (5, 6, 20))
    x_ND, mask_NE = torch.randn(20, N).t().to(DEVICE), make_mask("some", N, 5)
    args = (x_ND, mask_NE, weights.up_ESD, weights.down_ESD, weights.gate_ESD, None, None, None, "silu")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lte_lightning.triton_ffn, args, test_utils=tests)
    args = (x_ND, torch.randn(5, 20, device=DEVICE), None, torch.tensor(0.5, device=DEVICE))
    torch.library.opcheck(torch.ops.lte_lightning.triton_router, args, test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
@pytest.mark.parametrize("N", [1, 7, 200])
def test_replayed_as_a_cuda_graph_on_other_masks(N):
    weights = make_weights(torch.bfloat16, (40, 32, 256))
    x_ND = torch.randn(N, 256, dtype=torch.bfloat16, device=DEVICE)
    mask_NE = make_mask("some", N, 40)
    run_triton(x_ND, mask_NE, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_ND = run_triton(x_ND, mask_NE, weights)
    for selection in ("few", "all", "none"):
        x_ND.normal_()
        mask_NE.copy_(make_mask(selection, N, 40))
        graph.replay()
        assert_equal_to_rounding(y_ND, run_reference(x_ND, mask_NE, weights))

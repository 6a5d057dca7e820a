"""A model on the triton backend: on a GPU (nox -s gpu), or in the interpreter (test_triton_interpreted.py)."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="triton is not installed")

import lte_lightning.kernels.triton.ffn
import lte_lightning.kernels.triton.router  # noqa: F401 - they register the operators
from lte_lightning import LteConfig, RouterTrace, convert, set_backend, set_mode
from lte_lightning.bench.subject import ForcedSelector
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.kernels.triton.common import INTERPRETED
from lte_lightning.selection import SELECTORS, FfnShape

DEVICE = "cpu" if INTERPRETED else "cuda"
LAYERS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET is not 1"
    ),
]


class Spy(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))

    def of_ours(self):
        names = ("triton_router", "triton_ffn")
        return tuple(self.calls[f"lte_lightning.{name}.default"] for name in names)


@pytest.fixture
def make():
    """`make(backend)`: the same small decoder in hard mode at each call, about half of its experts off."""

    def make(backend="triton"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
        convert(model, LteConfig(expert_size=8, grouping="contiguous"), progress=False)
        with torch.no_grad():
            for parameter in selector_parameters(model):
                parameter.normal_()
        set_mode(model, "hard")
        model.to(DEVICE)
        set_backend(model, backend)
        return model

    return make


@torch.no_grad()
def spied(model, *args):
    with Spy() as spy:
        out = model(*args)
    return getattr(out, "logits", out), spy.of_ours()


@pytest.mark.parametrize("tokens", [(1, 1), (3, 2), (2, 40)])
def test_the_router_runs_on_the_device(make, tokens):
    ids_BT = torch.randint(3, 64, tokens, device=DEVICE)
    expected, none = spied(make("reference"), ids_BT)
    actual, calls = spied(make(), ids_BT)
    assert (none, calls) == ((0, 0), (LAYERS, LAYERS))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    model = make()
    with RouterTrace(model) as trace, torch.no_grad():
        model(ids_BT)
    assert 0.2 < trace.sparsity() < 0.8


def test_generation_gives_the_oracles_tokens(make):
    ids_BT = torch.randint(3, 64, (2, 5), device=DEVICE)
    options = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = make("reference").generate(ids_BT, **options, pad_token_id=0)
    with Spy() as spy:
        actual = make().generate(ids_BT, **options, pad_token_id=0)
    assert actual.equal(expected)
    assert spy.of_ours() == (4 * LAYERS, 4 * LAYERS)


def test_who_wants_scores_or_gradients_gets_torchs_router(make):
    model, ids_BT = make(), torch.randint(3, 64, (2, 3), device=DEVICE)
    expected, _ = spied(model, ids_BT)
    with RouterTrace(model) as trace:
        actual, calls = spied(model, ids_BT)
    assert calls == (0, LAYERS)
    assert trace.scores()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with Spy() as spy:
        assert model(ids_BT).logits.requires_grad
    assert spy.of_ours() == (0, 0)
    set_mode(model, "dense")
    assert spied(model, ids_BT)[1] == (0, 0)


def test_other_selectors_are_asked(make):
    model, ids_BT = make(), torch.randint(3, 64, (1, 3), device=DEVICE)
    for ffn in expert_ffns(model).values():
        ffn.selector = SELECTORS["random"](FfnShape(ffn.width, ffn.experts), 0.5).to(DEVICE)
    assert spied(model, ids_BT)[1] == (0, LAYERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(make, dtype):
    """Rounding decides a score that lies on the threshold: tokens that have one are not compared."""
    ids_BT = torch.randint(3, 64, (2, 3), device=DEVICE)
    for autocast in (False, True):
        model = make()
        if not autocast:
            model.to(dtype)
        ffn = next(iter(expert_ffns(model).values()))
        x_BTD = torch.randn(2, 3, 32, device=DEVICE, dtype=ffn.up.weight.dtype)
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            out_BTD, calls = spied(ffn, x_BTD)
            assert calls == (1, 1)
            scores_BTE = ffn.selector(x_BTD)
            clear = ((scores_BTE - ffn.threshold).abs() > 0.02).all(dim=-1)
            ffn.backend = "reference"
            expected, _ = spied(ffn, x_BTD)
            assert spied(model, ids_BT)[0].isfinite().all()
        assert clear.any()
        assert out_BTD.dtype == expected.dtype == dtype
        torch.testing.assert_close(out_BTD[clear], expected[clear], rtol=0.05, atol=0.05)


def test_compiled_as_one_graph(make):
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    model, reference = make(), make("reference")
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    for tokens in ((1, 1), (2, 3)):
        ids_BT = torch.randint(3, 64, tokens, device=DEVICE)
        with torch.no_grad():
            actual, expected = compiled(ids_BT, use_cache=False).logits, reference(ids_BT).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for code in graphs:
        assert [code.count(f"lte_lightning.{name}") for name in ("triton_router", "triton_ffn")] == [LAYERS, LAYERS]


def test_the_benchmark_pays_for_the_same_router(make):
    model, x_BTD = make(), torch.randn(1, 1, 32, device=DEVICE)
    ffn = next(iter(expert_ffns(model).values()))
    ffn.selector = ForcedSelector(ffn, torch.float32)
    ffn.selector.pool = [torch.ones(1, 1, ffn.experts, device=DEVICE)]
    assert spied(ffn, x_BTD)[1] == (1, 1)

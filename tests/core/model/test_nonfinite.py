"""What is not finite in the weights of experts that a token did not select never reaches it, on any backend."""

import pytest
import torch

from lte_lightning import LteConfig, convert, set_backend, set_mode
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import weight_rows
from lte_lightning.selection import SELECTORS, FfnShape, Selector
from lte_lightning.selection.sigmamoe import SigmaMoe

IDLE = slice(16, 32)  # the neurons of the second expert


@pytest.fixture
def hard(build, scatter):
    """`hard(family)`: in hard mode and eval; about half of the experts run, the second of each layer never does."""

    def make(family="bert", head="classification"):
        model = scatter(convert(build(family, head, 0.0), LteConfig(expert_size=16), progress=False))
        set_mode(model, "hard")
        for ffn in expert_ffns(model).values():
            with torch.no_grad():
                ffn.selector.bias[1] = -1e4
        return model

    return make


@torch.no_grad()
def poison(model, value=torch.nan):
    for ffn in expert_ffns(model).values():
        for projection in (ffn.up, ffn.gate):
            if projection is not None:
                weight_rows(projection)[IDLE] = value
                if projection.bias is not None:
                    projection.bias[IDLE] = value
        weight_rows(ffn.down)[:, IDLE] = value
    return model


class Given(Selector):
    """Scores that a test prescribes, whatever the input."""

    def __init__(self, scores_BTE):
        super().__init__()
        self.scores_BTE = scores_BTE

    def forward(self, x_BTD):
        return self.scores_BTE


class GivenGates(Given):
    scales = True


def one_ffn(model, kind=Given):
    """One FFN of a model, an input of three rows, and which of its tokens select the second expert."""
    ffn = next(iter(expert_ffns(model).values()))
    generator = torch.Generator().manual_seed(0)
    scores_BTE = torch.rand(3, 4, ffn.experts, generator=generator)
    scores_BTE *= scores_BTE > 0.5
    scores_BTE[0, 1:, 1], scores_BTE[0, 0, 1], scores_BTE[1:, :, 1] = 0.75, 0.0, 0.0
    ffn.selector = kind(scores_BTE)
    return ffn, torch.randn(3, 4, ffn.width, generator=generator), scores_BTE[..., 1] > 0


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["dense-mask", "auto", "reference"])
def test_is_not_seen(row_family, backend, value, hard, batch):
    model = hard(row_family)
    set_backend(model, backend)
    with torch.no_grad():
        expected = model(**batch).logits
        close(poison(model, value)(**batch).logits, expected)


@pytest.mark.parametrize("backend", ["dense-mask", "auto"])
def test_is_not_seen_under_autocast(row_family, backend, hard, batch):
    model = hard(row_family)
    set_backend(model, backend)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        close(poison(model)(**batch).logits, expected, 0.02)


def test_is_not_seen_in_train_mode_without_gradients(row_family, hard, batch):
    model = hard(row_family).train()
    with torch.no_grad():
        assert poison(model)(**batch).logits.isfinite().all()


def test_gradients_in_eval_mode_are_those_of_the_experts_that_ran(row_family, hard, batch):
    model, other = hard(row_family), poison(hard(row_family))
    for net in (model, other):
        net(**batch).logits.square().sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            close(mine.grad, theirs.grad, 1e-4)


def test_what_tokens_did_select_is_seen(hard, batch):
    model = hard()
    for ffn in expert_ffns(model).values():
        ffn.selector.bias.data[1] = 1e4
    with torch.no_grad():
        assert poison(model)(**batch).logits.isnan().all()


def test_torch_compile_traces_it_whole(hard, batch):
    model = hard("llama", "lm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(**batch).logits
        close(compiled(**batch).logits, expected)
        close(poison(compiled)(**batch).logits, expected)


# torch.export 2.13 reads .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("family", "head"), [("phi3", "lm"), ("modernbert", "classification")])
def test_torch_compile_and_export_take_fused_projections_with_gradients(family, head, hard, batch):
    """Gate and up share memory, which the branches of a graph may not both read where gradients are enabled."""
    model = hard(family, head)
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(**batch).logits, expected)
    compiled(**batch).logits.square().sum().backward()
    assert all(ffn.up.weight.grad.isfinite().all() for ffn in expert_ffns(model).values())
    exported = torch.export.export(model, (), dict(batch)).module()
    close(exported(**batch).logits, expected)
    poison(model)
    close(compiled(**batch).logits, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["dense-mask", "auto", "reference"])
def test_other_tokens_selected_it(row_family, backend, value, hard):
    model = hard(row_family)
    set_backend(model, backend)
    ffn, x_BTD, selected_BT = one_ffn(model)
    with torch.no_grad():
        expected = ffn(x_BTD)
        poison(model, value)
        actual = ffn(x_BTD)
        close(actual[~selected_BT], expected[~selected_BT])
        assert not actual[selected_BT].isfinite().any()
        ffn.selector.scores_BTE = ffn.selector.scores_BTE[1:2]
        close(ffn(x_BTD[1:2]), expected[1:2])  # the same row alone


@pytest.mark.parametrize("kind", [Given, GivenGates])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_weight_of_the_down_projection_spoils_one_output(kind, autocast, hard):
    ffn, x_BTD, selected_BT = one_ffn(hard("llama", "lm"), kind)

    @torch.no_grad()
    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # each keeps the weights that it has converted
            return ffn(x_BTD)

    expected = run()
    with torch.no_grad():
        weight_rows(ffn.down)[7, IDLE.start + 3] = torch.nan
    actual = run()
    expected[..., 7] = expected[..., 7].masked_fill(selected_BT, torch.nan)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0.02, atol=0.02 if autocast else 1e-5)


def test_torch_compile_keeps_tokens_apart_too(hard):
    ffn, x_BTD, selected_BT = one_ffn(hard("llama", "lm"))
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x_BTD)
        weight_rows(ffn.down)[:, IDLE] = torch.nan
        actual = compiled(x_BTD)
    close(actual[~selected_BT], expected[~selected_BT])
    assert actual[selected_BT].isnan().all()


@pytest.mark.parametrize("name", [name for name, kind in SELECTORS.items() if kind.reads != "input"])
def test_selectors_that_read_activations(name, hard):
    """They read all experts; what is not finite in the down projection alone is nothing that they see."""
    ffn, x_BTD, _ = one_ffn(hard("llama", "lm"))
    ffn.expert_size = 1
    ffn.selector = SELECTORS[name](FfnShape(ffn.width, ffn.experts, gated=True), 0.5)
    if ffn.selector.rule == "level":
        ffn.selector.level.fill_(0.1)
    elif ffn.selector.rule == "fixed":
        ffn.selector.chosen_E[::2] = 0.0
    if name == "teal":
        ffn.selector.input_levels.fill_(0.3)
    with torch.no_grad():
        expected = ffn(x_BTD)
        kept = []
        ffn.recorder = lambda _, scores_BTE, x_BTD: kept.append(scores_BTE)
        ffn(x_BTD)
        ffn.recorder = None
        selected_BT = kept[0][..., 4] > 0
        weight_rows(ffn.down)[:, 4] = torch.nan
        actual = ffn(x_BTD)
    assert not selected_BT.all()
    close(actual[~selected_BT], expected[~selected_BT])
    assert actual[selected_BT].isnan().all()


def test_gates_that_scale(hard):
    ffn, x_BTD, _ = one_ffn(hard("llama", "lm"))
    ffn.selector, ffn.threshold = SigmaMoe(FfnShape(ffn.width, ffn.experts, gated=True), 0.5).eval(), 0.0
    with torch.no_grad():
        expected, selected_BT = ffn(x_BTD), ffn.selector(x_BTD)[..., 1] > 0
        poison(ffn)
        actual = ffn(x_BTD)
    assert 0 < selected_BT.sum() < selected_BT.numel()
    close(actual[~selected_BT], expected[~selected_BT])
    assert actual[selected_BT].isnan().all()

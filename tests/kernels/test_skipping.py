import pytest
import torch
from torch.nn import functional

from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu import train
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.instructions import instruction_set, instruction_sets
from lte_lightning.kernels.dense_mask import dense_hidden, scale_experts
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.skipping import run_skipping, skips


def tensors_of(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(weights).items() if isinstance(value, torch.Tensor)}


def by_masking(x_ND, mask_NE, weights):
    hidden_NF = scale_experts(dense_hidden(x_ND, weights), mask_NE)
    return functional.linear(hidden_NF, weights.down_ESD.flatten(0, 1).T, weights.down_bias_D)


def outcome(run, x_ND, mask_NE, weights):
    """Returns the output and the gradients of input, weights and biases, for a loss that weighs outputs unequally."""
    leaves = {"x_ND": x_ND, **tensors_of(weights)}
    for leaf in leaves.values():
        leaf.requires_grad_().grad = None
    out_ND = run(x_ND, mask_NE, weights)
    (out_ND * torch.linspace(-1, 1, out_ND.numel()).view_as(out_ND)).sum().backward()
    return {"out_ND": out_ND.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.fixture
def with_threads():
    """`with_threads(2)`: torch has that many in this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_and_gradients_are_those_of_masking(make_weights, activation, gated, biases, threads, with_threads):
    with_threads(threads)
    weights = make_weights(5, 3, 8, activation, gated, biases)
    mask_NE = torch.rand(23, 5) < 0.3
    mask_NE[:, 2] = False  # no token runs it
    mask_NE[9] = False  # it runs no expert
    x_ND = torch.randn(23, 8)
    expected, actual = (outcome(run, x_ND, mask_NE, weights) for run in (by_masking, run_skipping))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert not actual["up_ESD"][2].any()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("S", "D"), [(32, 64), (3, 71), (33, 72), (5, 200)])
@pytest.mark.parametrize("tokens", [1, 50, 1300])
def test_odd_sizes_and_more_tokens_than_are_taken_at_a_time(make_weights, dtype, S, D, tokens):
    weights = make_weights(3, S, D, "silu", gated=True, biases=True, dtype=dtype)
    exact = ExpertWeights(activation="silu", **{name: value.double() for name, value in tensors_of(weights).items()})
    x_ND, mask_NE = torch.randn(tokens, D).to(dtype), torch.rand(tokens, 3) < 0.6
    expected = outcome(by_masking, x_ND.double(), mask_NE, exact)
    actual = outcome(run_skipping, x_ND, mask_NE, weights)
    close = 0.02 if dtype == torch.bfloat16 else 1e-4  # of the output's bias, which torch sums; others are closer
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= close * value.norm() + 1e-6, name


@pytest.mark.parametrize("instructions", instruction_sets())
def test_every_instruction_set_of_this_machine(make_weights, instructions, monkeypatch):
    levels = list(instruction_sets())
    if levels.index(instructions) > levels.index(instruction_set()):
        pytest.skip(f"this machine has no {instructions}")
    monkeypatch.setattr(train, "library", lambda: build(instructions))
    mask_NE = torch.rand(300, 4) < 0.5
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        weights, x_ND = make_weights(4, 6, 50, "relu", gated=True, dtype=dtype), torch.randn(300, 50).to(dtype)
        expected, actual = (outcome(run, x_ND, mask_NE, weights) for run in (by_masking, run_skipping))
        for name, value in expected.items():
            assert (actual[name] - value).norm() <= close * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(make_weights, dtype, with_threads):
    weights = make_weights(5, 32, 200, "relu", gated=True, biases=True, dtype=dtype)
    x_ND, mask_NE = torch.randn(1100, 200).to(dtype), torch.rand(1100, 5) < 0.5
    found = []
    for threads in (1, 3):
        with_threads(threads)
        found.append(outcome(run_skipping, x_ND, mask_NE, weights))
    for name, value in found[0].items():
        if not name.endswith("bias_ES") and name != "down_bias_D":  # torch sums those
            assert value.equal(found[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_masked(make_weights, dtype):
    weights = make_weights(3, 2, 4, "silu", True, True, dtype)
    mask_NE, x_ND = torch.tensor([[True, False, True], [False, False, True]]), torch.randn(2, 4).to(dtype)
    expected, actual = (outcome(run, x_ND, mask_NE, weights) for run in (by_masking, run_skipping))
    for name, value in expected.items():
        assert actual[name].equal(value), name


def test_without_compiled_kernels_every_expert_is_computed(make_weights, monkeypatch):
    weights, x_ND, mask_NE = make_weights(3, 8, 12), torch.randn(5, 12), torch.rand(5, 3) < 0.5
    monkeypatch.setattr(train, "library", lambda: None)
    expected, actual = (outcome(run, x_ND, mask_NE, weights) for run in (by_masking, run_skipping))
    for name, value in expected.items():
        assert actual[name].equal(value), name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_nothing_and_everything_selected(make_weights, share, tokens, gated):
    weights = make_weights(4, 2, 6, gated=gated, biases=True)
    torch.full((4, 2, 6), torch.nan)  # memory that a result may get next
    mask_NE = torch.rand(tokens, 4) < share
    expected, actual = (outcome(run, torch.ones(tokens, 6), mask_NE, weights) for run in (by_masking, run_skipping))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


def test_bfloat16_sums_in_float32(make_weights):
    weights = make_weights(16, 4, 32, gated=True, dtype=torch.bfloat16)
    exact = ExpertWeights(activation="silu", **{name: value.double() for name, value in tensors_of(weights).items()})
    x_ND, mask_NE = torch.randn(40, 32).bfloat16(), torch.rand(40, 16) < 0.5
    expected = outcome(by_masking, x_ND.double(), mask_NE, exact)
    actual = outcome(run_skipping, x_ND, mask_NE, weights)
    for name, value in expected.items():
        assert actual[name].dtype == torch.bfloat16
        # rounded activations, and a rounded result
        assert (actual[name] - value).norm() < 0.01 * value.norm()


def test_only_wanted_gradients_are_made(make_weights):
    weights = make_weights(4, 2, 6, gated=True, biases=True)
    mask_NE, x_ND = torch.rand(9, 4) < 0.5, torch.randn(9, 6)
    weights.gate_ESD.requires_grad_()
    run_skipping(x_ND, mask_NE, weights).sum().backward()
    assert weights.gate_ESD.grad is not None
    assert all(tensor.grad is None for name, tensor in tensors_of(weights).items() if name != "gate_ESD")
    assert x_ND.grad is None


def test_weights_that_no_token_selected_are_not_read(make_weights):
    weights = make_weights(4, 2, 6)
    for tensor in tensors_of(weights).values():
        tensor[1] = torch.nan
    mask_NE = torch.tensor([[True, False, True, False]] * 3)
    found = outcome(run_skipping, torch.randn(3, 6), mask_NE, weights)
    assert all(value.isfinite().all() for value in found.values())


def test_a_second_derivative_is_refused(make_weights):
    weights, x_ND = make_weights(4, 2, 6), torch.randn(3, 6, requires_grad=True)
    out_ND = run_skipping(x_ND, torch.ones(3, 4, dtype=torch.bool), weights)
    with pytest.raises(UserError, match="create_graph"):
        torch.autograd.grad(out_ND.sum(), x_ND, create_graph=True)


def test_it_is_chosen_for_few_pairs_of_many_tokens():
    few, most = torch.zeros(4096, 48, dtype=torch.bool), torch.ones(4096, 48, dtype=torch.bool)
    few[:, :5] = True
    assert skips(few, torch.float32)
    assert skips(few, torch.bfloat16)
    assert not skips(most, torch.float32)
    assert not skips(few[:32], torch.float32)  # an expert's products would be too small
    assert not skips(few[:100], torch.bfloat16)
    assert not skips(few, torch.float16)  # nobody measured it

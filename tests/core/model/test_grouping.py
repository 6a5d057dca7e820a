import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_lightning.core.model.grouping import _assign, _swap, _tournament, expert_count, group_neurons
from lte_lightning.errors import UserError

METHODS = ["kmeans", "coactivation", "random", "contiguous"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(neurons, width, clusters, noise, seed=0):
    directions = randn(clusters, width, seed=seed)
    labels = torch.randint(clusters, (neurons,), generator=torch.Generator().manual_seed(seed))
    return directions[labels] + noise * randn(neurons, width, seed=seed + 1)


def naive_inertia(weight, permutation, size):
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return sum(float(((rows[m] - rows[m].mean(0)) ** 2).sum()) for m in permutation.split(size))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("neurons", "size"), [(64, 32), (32, 32), (7, 1), (1, 1), (96, 32), (35, 5), (60, 4), (34, 17)]
)
def test_permutation_and_inertia_at_every_size(method, neurons, size):
    weight = randn(neurons, 9)
    grouping = group_neurons(weight, size, method)
    assert grouping.permutation_F.dtype == torch.int64
    assert grouping.permutation_F.sort().values.equal(torch.arange(neurons))
    assert grouping.inertia == pytest.approx(naive_inertia(weight, grouping.permutation_F, size), rel=1e-5, abs=1e-5)
    shuffled = group_neurons(weight, size, "random").permutation_F
    assert grouping.random_inertia == pytest.approx(naive_inertia(weight, shuffled, size), rel=1e-5, abs=1e-5)


@given(experts=st.integers(1, 9), size=st.integers(1, 8), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_kmeans_is_a_partition_no_worse_than_random(experts, size, width, seed):
    # Few distinct values: many rows are equal or zero.
    weight = randn(experts * size, width, seed=seed).round()
    grouping = group_neurons(weight, size, seed=seed)
    assert grouping.permutation_F.sort().values.equal(torch.arange(experts * size))
    assert grouping.inertia <= grouping.random_inertia + 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_leaves_the_global_generator_alone(method):
    weight = randn(256, 32)
    state = torch.get_rng_state()
    first = group_neurons(weight, 32, method, seed=3)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    second = group_neurons(weight, 32, method, seed=3)
    assert first.permutation_F.equal(second.permutation_F)
    assert (first.inertia, first.random_inertia) == (second.inertia, second.random_inertia)


def test_another_seed_is_another_random_grouping():
    weight = randn(64, 8)
    assert not group_neurons(weight, 8, "random", 0).permutation_F.equal(
        group_neurons(weight, 8, "random", 1).permutation_F
    )


def test_contiguous_keeps_the_order():
    assert group_neurons(randn(64, 8), 8, "contiguous").permutation_F.equal(torch.arange(64))


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    label = torch.arange(8).repeat_interleave(32)[torch.randperm(256)]
    # Lengths differ: only directions count.
    weight = (randn(8, 24)[label] + 0.1 * randn(256, 24, seed=1)) * (0.1 + torch.rand(256, 1))
    found = label[group_neurons(weight, 32, seed=seed).permutation_F].view(8, 32)
    assert (found == found[:, :1]).all()
    assert found[:, 0].sort().values.equal(torch.arange(8))


def test_neurons_that_act_together_are_found():
    """Planted by what neurons do, not by how strongly, and found again."""
    label = torch.arange(8).repeat_interleave(8)[torch.randperm(64)]
    fires = (torch.rand(8, 300) < 0.2).float()
    activations = fires[label] * torch.rand(64, 300) * (0.1 + torch.rand(64, 1)) + 0.02 * torch.rand(64, 300)
    found = label[group_neurons(activations, 8, "coactivation").permutation_F].view(8, 8)
    assert (found == found[:, :1]).all()
    assert found[:, 0].sort().values.equal(torch.arange(8))


def test_coactivation_puts_the_edges_of_its_graph_within_experts():
    activations = randn(48, 100).abs() * (randn(6, 100, seed=1) > 0.5).repeat(8, 1)
    rows = torch.nn.functional.normalize(activations, dim=1)
    edges = rows @ rows.T

    def within(permutation):
        return sum(float(edges[m][:, m].sum()) for m in permutation.split(8))

    grouping = group_neurons(activations, 8, "coactivation")
    assert grouping.inertia == pytest.approx(48 - within(grouping.permutation_F) / 8, rel=1e-4)
    assert within(grouping.permutation_F) > 1.5 * within(group_neurons(activations, 8, "random").permutation_F)


def test_kmeans_beats_random_even_on_noise():
    grouping = group_neurons(randn(512, 64), 32)
    assert grouping.inertia < 0.92 * grouping.random_inertia


@pytest.mark.parametrize(("clusters", "noise"), [(16, 1.0), (40, 0.3), (9, 0.5), (1, 3.0)])
def test_as_good_as_k_means_constrained(clusters, noise):
    package = pytest.importorskip("k_means_constrained")
    weight = clustered(512, 64, clusters, noise)
    rows = torch.nn.functional.normalize(weight, dim=1).numpy()
    reference = package.KMeansConstrained(16, size_min=32, size_max=32, n_init=1, random_state=0).fit(rows)
    assert group_neurons(weight, 32).inertia <= 1.02 * reference.inertia_


def test_two_experts_end_where_no_swap_helps():
    weight = randn(32, 12)
    permutation = group_neurons(weight, 16).permutation_F
    inertia = naive_inertia(weight, permutation, 16)
    for i in range(16):
        for j in range(16, 32):
            swapped = permutation.clone()
            swapped[i], swapped[j] = permutation[j], permutation[i]
            assert naive_inertia(weight, swapped, 16) > inertia - 1e-3


def test_swap_returns_what_it_gains():
    weight = torch.nn.functional.normalize(randn(63, 12), dim=1)
    members = torch.randperm(63).view(7, 9)
    before = naive_inertia(weight, members.flatten(), 9)
    gain = _swap((weight @ weight.T).numpy(), members.numpy(), np.array([[0, 4], [6, 2], [1, 5]]))
    assert gain > 1
    assert before - gain == pytest.approx(naive_inertia(weight, members.flatten(), 9), rel=1e-5)
    assert members.flatten().sort().values.equal(torch.arange(63))


def test_assignment_is_near_the_exact_one():
    optimize = pytest.importorskip("scipy.optimize")
    score = clustered(256, 16, 8, 0.5) @ randn(16, 8, seed=5)
    members = _assign(score, 32)
    rows, columns = optimize.linear_sum_assignment(score.repeat_interleave(32, dim=1).numpy(), maximize=True)
    exact = score[torch.from_numpy(rows), torch.from_numpy(columns // 32)].sum()
    ours = sum(score[member, expert].sum() for expert, member in enumerate(members))
    mean = score.mean(1).sum()
    assert ours - mean >= 0.9 * (exact - mean)


@pytest.mark.parametrize("experts", [1, 2, 3, 6, 7])
def test_every_pair_meets_once(experts):
    rounds = list(_tournament(experts, torch.Generator().manual_seed(0)))
    assert all(len(pairs.unique()) == pairs.numel() for pairs in rounds)
    met = [frozenset(pair) for pairs in rounds for pair in pairs.tolist()]
    assert len(met) == len(set(met)) == experts * (experts - 1) // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [torch.zeros(64, 8), torch.ones(64, 8), torch.eye(8).repeat(8, 1)])
def test_zero_and_equal_rows(method, weight):
    grouping = group_neurons(weight, 8, method)
    assert grouping.permutation_F.sort().values.equal(torch.arange(64))
    assert grouping.inertia >= 0
    if method in ("kmeans", "coactivation"):
        assert grouping.inertia == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_type(dtype):
    weight = randn(64, 16).to(dtype)
    weight.requires_grad_()
    grouping = group_neurons(weight, 16)
    assert grouping.permutation_F.equal(group_neurons(weight.detach().float(), 16).permutation_F)


@pytest.mark.gpu
def test_weight_on_the_gpu_gives_the_same():
    weight = randn(64, 16)
    assert group_neurons(weight.cuda(), 16).permutation_F.equal(group_neurons(weight, 16).permutation_F)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value):
    weight = randn(64, 8)
    weight[5, 3] = value
    with pytest.raises(ValueError, match=r"1 of 64 neurons .* row 5"):
        group_neurons(weight, 8)


def test_activations_that_are_not_finite():
    activations = randn(64, 8).abs()
    activations[5, 3] = torch.inf
    with pytest.raises(ValueError, match=r"1 of 64 neurons have NaN or infinite activations, .* row 5"):
        group_neurons(activations, 8, "coactivation")


def test_expert_count():
    assert expert_count(3072, 32) == 96
    assert expert_count(11008, 32) == 344


@pytest.mark.parametrize(
    ("neurons", "size", "message"),
    [
        (3072, 33, r"expert_size=33 .* 3072 .*: 32, 24, 48, 16, 12, 8\."),
        (3072, 0, r"expert_size=0 .*: 1, 2, 3"),
        (3072, -4, r"expert_size=-4 "),
        (64, 128, r"expert_size=128 .*: 64, 32"),
        (7, 2, r"expert_size=2 .*: 1, 7\."),
        (0, 32, "An FFN of 0 neurons"),
    ],
)
def test_sizes_that_do_not_come_out_even(neurons, size, message):
    with pytest.raises(ValueError, match=message):
        expert_count(neurons, size)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"'kmean'.*kmeans, coactivation, use, random, contiguous"):
        group_neurons(randn(64, 8), 8, "kmean")
    with pytest.raises(ValueError, match="expert_size=7"):
        group_neurons(randn(64, 8), 7)
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        group_neurons(randn(64), 8)


def test_the_most_used_neurons_come_first():
    activations, use_F = randn(160, 30).abs(), torch.rand(160)
    grouping = group_neurons(activations, 8, "use", use_F=use_F)
    assert grouping.permutation_F.sort().values.equal(torch.arange(160))
    members_ES = grouping.permutation_F.view(20, 8)
    hot = use_F[members_ES[:2]]  # a tenth of twenty experts
    assert hot[0].min() >= hot[1].max()
    assert hot.min() >= use_F[members_ES[2:]].max()

    with pytest.raises(UserError, match="needs how much each neuron does"):
        group_neurons(activations, 8, "use")

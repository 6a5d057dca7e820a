"""Partition the neurons of an FFN into experts of equal size.

Shape suffixes: E experts, S neurons per expert, F = E * S neurons, D model width, C candidate seeds, R rejected
neurons, P disjoint pairs of experts, Q = 2 * S neurons of such a pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn.functional import normalize

from lte_lightning.errors import UserError

Method = Literal["kmeans", "coactivation", "use", "random", "contiguous"]
USED = 0.1
"""Share of the experts that grouping ``use`` makes of the most used neurons."""

_SEED_TRIALS = 8
_LLOYD_STEPS = 10
_SWEEPS = 4
# A sweep that lowers the inertia by less than this share is the last sweep.
_SWEEP_TOLERANCE = 5e-3
# Far above the rounding error of float32 sums over 2 S unit vectors, so that duplicate rows are not swapped for ever.
_MIN_GAIN = 1e-3


@dataclass(frozen=True)
class Grouping:
    """A partition of F neurons into experts.

    Attributes:
        permutation_F: int64 on the CPU; the neurons ``permutation_F[e * S : (e + 1) * S]`` belong to expert ``e``, in
            ascending order.
        inertia: Sum over neurons of the squared distance of the L2-normalised weight vector to the mean of its expert.
        random_inertia: The same for the random grouping of the same seed, which shows the gain of clustering.
    """

    permutation_F: torch.Tensor
    inertia: float
    random_inertia: float


def expert_count(neurons: int, expert_size: int) -> int:
    """Returns the number of experts of ``expert_size`` neurons in an FFN. The size must divide the neurons."""
    if neurons < 1:
        raise UserError(f"An FFN of {neurons} neurons cannot be split into experts.")
    if expert_size < 1 or neurons % expert_size:
        divisors = [d for d in range(1, neurons + 1) if neurons % d == 0]
        nearest = sorted(divisors, key=lambda d: abs(d - expert_size))[:6]
        raise UserError(
            f"expert_size={expert_size} does not split {neurons} neurons evenly. Divisors of {neurons}, nearest first: "
            f"{', '.join(map(str, nearest))}."
        )
    return neurons // expert_size


def group_neurons(
    weight_FD: torch.Tensor,
    expert_size: int,
    method: Method = "kmeans",
    seed: int = 0,
    use_F: torch.Tensor | None = None,
) -> Grouping:
    """Groups neurons with similar input weights, or that act together, into experts of exactly ``expert_size``.

    Works on the CPU in float32. ``kmeans`` holds the F x F Gram matrix of the rows: 0.5 GB for a layer of LLaMA-2-7B.

    Args:
        weight_FD: Input weights, a row per neuron: the up projection, or the gate of a gated FFN. For ``coactivation``
            and ``use``, each neuron's |activations| on D training tokens.
        expert_size: Neurons per expert, a divisor of F.
        method: ``kmeans`` (balanced, on L2-normalised rows), ``coactivation``, ``random``, or ``contiguous`` (the
            checkpoint's order). ``use`` fills a tenth of the experts (`USED`) with the neurons that do most, in their
            order, so that a router may let these run nearly always, and groups the rest by ``coactivation``.
            ``coactivation`` is MoEfication's co-activation graph split (arXiv 2110.01786). It runs the same clustering
            on |activations|: the Gram matrix of their normalised rows holds the graph's edges, and the least inertia
            puts the most weight of edges within experts.
        seed: Equal seeds give equal groupings. The function neither reads nor moves torch's global generator.
        use_F: For ``use``, how much each neuron does: its mean |activation| times the norm of its down column.
    """
    if method not in get_args(Method):
        raise UserError(f"Unknown grouping method {method!r}. Choose one of: {', '.join(get_args(Method))}.")
    if weight_FD.ndim != 2:
        raise UserError(f"Expected a matrix with a row per neuron, got a weight of shape {tuple(weight_FD.shape)}.")
    neurons = weight_FD.shape[0]
    experts = expert_count(neurons, expert_size)
    rows_FD = weight_FD.detach().to("cpu", torch.float32)
    bad_rows = (~rows_FD.isfinite()).any(1).nonzero()[:, 0]
    if len(bad_rows):
        values = "activations" if method in ("coactivation", "use") else "weights"
        raise UserError(
            f"{len(bad_rows)} of {neurons} neurons have NaN or infinite {values}, the first is row {int(bad_rows[0])}. "
            "Group a checkpoint that trained without overflow."
        )
    rows_FD = normalize(rows_FD, dim=1)
    generator = torch.Generator().manual_seed(seed)
    random_ES = torch.randperm(neurons, generator=generator).view(experts, expert_size)
    if method == "random":
        members_ES = random_ES
    elif method == "contiguous":
        members_ES = torch.arange(neurons).view(experts, expert_size)
    elif method == "use":
        members_ES = _by_use(rows_FD, expert_size, generator, use_F)
    else:
        members_ES = _balanced_kmeans(rows_FD, expert_size, generator)
    return Grouping(
        members_ES.sort(dim=1).values.flatten(), _inertia(rows_FD, members_ES), _inertia(rows_FD, random_ES)
    )


def _by_use(rows_FD: torch.Tensor, size: int, generator: torch.Generator, use_F: torch.Tensor | None) -> torch.Tensor:
    if use_F is None or len(use_F) != len(rows_FD):
        raise UserError("grouping 'use' needs how much each neuron does (use_F)")
    order_F = use_F.argsort(descending=True, stable=True)
    used = round(USED * (len(rows_FD) // size)) * size
    rest_R = order_F[used:].sort().values
    return torch.cat([order_F[:used].view(-1, size), rest_R[_balanced_kmeans(rows_FD[rest_R], size, generator)]])


def _means(rows_FD: torch.Tensor, members_ES: torch.Tensor) -> torch.Tensor:
    return rows_FD[members_ES.flatten()].unflatten(0, members_ES.shape).mean(1)


def _inertia(rows_FD: torch.Tensor, members_ES: torch.Tensor) -> float:
    means_ED = _means(rows_FD, members_ES)
    owner_F = torch.empty(len(rows_FD), dtype=torch.long)
    owner_F[members_ES.flatten()] = torch.arange(len(members_ES)).repeat_interleave(members_ES.shape[1])
    return (rows_FD - means_ED[owner_F]).square().sum(dtype=torch.float64).item()


def _balanced_kmeans(rows_FD: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Runs Lloyd steps from k-means++ seeds, then settles each neuron by swaps between pairs of experts.

    Lloyd steps alone stall early in high dimensions: each neuron pulls the mean of its expert towards itself, and so
    stays where it is. The gain of a swap is exact.
    """
    gram_FF = rows_FD @ rows_FD.T
    means_ED = rows_FD[_seeds(gram_FF, len(rows_FD) // size, generator)]
    inertia = float("inf")
    for _ in range(_LLOYD_STEPS):
        assigned_ES = _assign(rows_FD @ means_ED.T - means_ED.square().sum(1) / 2, size)
        means_ED = _means(rows_FD, assigned_ES)
        new_inertia = float(gram_FF.trace() - size * means_ED.square().sum())
        if new_inertia >= inertia:
            break
        members_ES, inertia = assigned_ES, new_inertia
    # NumPy, because these many small operations are slower on several threads than on one.
    gram, members = gram_FF.numpy(), members_ES.numpy()
    for _ in range(_SWEEPS):
        gain = sum(_swap(gram, members, pairs_P2.numpy()) for pairs_P2 in _tournament(len(members), generator))
        inertia -= gain
        if gain <= _SWEEP_TOLERANCE * inertia:
            break
    return members_ES


def _seeds(gram_FF: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Chooses neurons far from each other by k-means++. Each seed is the best of a few candidates."""
    norm_F = gram_FF.diagonal()
    distance_F = torch.ones_like(norm_F)
    seeds: list[int] = []
    for _ in range(experts):
        # The floor lets neurons that equal a seed be drawn once nothing else is left.
        drawn_C = torch.multinomial(distance_F.clamp_min(1e-9), _SEED_TRIALS, replacement=True, generator=generator)
        to_drawn_CF = (norm_F + norm_F[drawn_C, None] - 2 * gram_FF[drawn_C]).clamp_min(0)
        if seeds:
            to_drawn_CF = torch.minimum(to_drawn_CF, distance_F)
        best = to_drawn_CF.sum(1).argmin()
        distance_F = to_drawn_CF[best]
        seeds.append(int(drawn_C[best]))
    return torch.tensor(seeds)


def _assign(score_FE: torch.Tensor, size: int) -> torch.Tensor:
    """Every neuron asks its best expert. An expert keeps its best ``size``, and the others ask their next best."""
    neurons, experts = score_FE.shape
    owner_F = score_FE.argmax(1)
    # A neuron that does not beat the lowest score of a full expert need not ask it, because that score only rises.
    lowest_E = torch.full((experts,), -torch.inf)
    while True:
        value_F = score_FE.gather(1, owner_F[:, None])[:, 0]
        order_F = value_F.argsort(descending=True, stable=True)
        order_F = order_F[owner_F[order_F].argsort(stable=True)]
        count_E = torch.bincount(owner_F, minlength=experts)
        rank_F = torch.arange(neurons) - (count_E.cumsum(0) - count_E)[owner_F[order_F]]
        rejected = order_F[rank_F >= size]
        if not len(rejected):
            return order_F.view(experts, size)
        last = order_F[rank_F == size - 1]
        lowest_E[owner_F[last]] = value_F[last]
        score_RE = score_FE[rejected]
        owner_F[rejected] = score_RE.masked_fill_(score_RE <= lowest_E, -torch.inf).argmax(1)


def _tournament(experts: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields rounds of disjoint pairs until every expert has met every other once (the circle method)."""
    players = experts + experts % 2
    ring = torch.randperm(players, generator=generator)
    for _ in range(players - 1):
        pairs_P2 = torch.stack([ring[: players // 2], ring[players // 2 :].flip(0)], dim=1)
        # With an odd number of experts the last player is a bye.
        yield pairs_P2[(pairs_P2 < experts).all(1)]
        ring = torch.cat([ring[:1], ring[1:].roll(1)])


def _swap(gram_FF: np.ndarray, members_ES: np.ndarray, pairs_P2: np.ndarray) -> float:
    """Swaps neurons within each pair of experts in ``members_ES``, best first, while it pays; returns the gain.

    With signs z = +1 in the first expert and -1 in the second, the inertia of the pair is a constant less
    z' gram z / (2 S). Swapping i of the first with j of the second lowers it by 2 / S (h_j - h_i + |x_i - x_j|^2),
    where h = gram z.
    """
    size = members_ES.shape[1]
    index_PQ = members_ES[pairs_P2].reshape(-1, 2 * size)
    gram_PQQ = gram_FF[index_PQ[:, :, None], index_PQ[:, None, :]]
    norm_PQ = gram_PQQ.diagonal(axis1=1, axis2=2).copy()
    h_PQ = gram_PQQ[:, :, :size].sum(2) - gram_PQQ[:, :, size:].sum(2)
    p = np.arange(len(index_PQ))  # the pairs that still swap
    total = 0.0
    for _ in range(2 * size):
        leave_PS, enter_PS = (norm_PQ - h_PQ)[p, :size], (norm_PQ + h_PQ)[p, size:]
        gain_PSS = leave_PS[:, :, None] + enter_PS[:, None, :] - 2 * gram_PQQ[p, :size, size:]
        gain_PX = gain_PSS.reshape(len(p), size * size)
        best_P = gain_PX.argmax(1)
        gain_P = gain_PX[np.arange(len(p)), best_P]
        pays = gain_P > _MIN_GAIN
        if not pays.any():
            break
        total += float(gain_P[pays].sum())
        p, i, j = p[pays], best_P[pays] // size, best_P[pays] % size + size
        h_PQ[p] += 2 * (gram_PQQ[p, j] - gram_PQQ[p, i])
        for table in (index_PQ, norm_PQ, h_PQ, gram_PQQ):
            table[p, i], table[p, j] = table[p, j], table[p, i]
        gram_PQQ[p, :, i], gram_PQQ[p, :, j] = gram_PQQ[p, :, j], gram_PQQ[p, :, i]
    members_ES[pairs_P2] = index_PQ.reshape(-1, 2, size)
    return 2 / size * total

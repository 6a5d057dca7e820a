"""Train without the experts that no token selected: forward and backward in plain torch, expert by expert.

Frozen routers fix a batch's selection before its forward pass. The gradients of equation 2 of the paper need only the
experts that a token ran. Each expert gathers its tokens and adds its output to theirs. Shapes: N tokens, P pairs of a
token and an expert that it runs, E experts of S neurons, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from lte_lightning.errors import UserError
from lte_lightning.kernels.layout import ACTIVATIONS, ExpertWeights, hidden_activations

# The most tokens at a time, so that the rows which their experts gather stay in the cache.
_CHUNK = 1024
# By type: (cost of a pair relative to one in a dense product, overhead of an expert on each thread in tokens).
# benchmarks/training.py measured them on two cores of Zen 4; a margin is included.
_COSTS = {torch.float32: (1.9, 150), torch.bfloat16: (2.0, 900)}

T = TypeVar("T")


def skips(mask_NE: torch.Tensor, dtype: torch.dtype) -> bool:
    """Says whether skipping is expected to be faster than computing every expert.

    The answer depends on the mask and the number of threads alone. A clock has no part in it, so that a resumed fit
    repeats an uninterrupted fit.
    """
    if dtype not in _COSTS:
        return False
    N, E = mask_NE.shape
    pair, expert = _COSTS[dtype]
    return pair * int(mask_NE.count_nonzero()) + expert * torch.get_num_threads() * E < N * E


def run_skipping(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output, which is differentiable once for the input, weights and biases.

    Sums over experts are float32. The backward pass keeps only the activations of the pairs.

    Args:
        x_ND: Input of N tokens, of the weights' type.
        mask_NE: True where a token runs an expert.
        weights: The FFN; its views need not be contiguous.

    Returns:
        The output [N, D] in the type of ``x_ND``.

    Raises:
        UserError: In a backward pass with ``create_graph``.
    """
    activation = ACTIVATIONS[weights.activation]
    tensors = (weights.up_ESD, weights.up_bias_ES, weights.gate_ESD, weights.gate_bias_ES, weights.down_ESD)
    out_ND = _Selected.apply(x_ND, mask_NE, activation, *tensors)
    return out_ND if weights.down_bias_D is None else out_ND + weights.down_bias_D


class _Chunk:
    """Some neighbouring tokens: their pairs with the experts that they run, and the activations of each pair."""

    def __init__(self, mask_NE: torch.Tensor, tokens: slice) -> None:
        self.tokens = tokens
        self.counts = mask_NE[tokens].sum(dim=0).tolist()
        self.rows_P = mask_NE[tokens].T.nonzero()[:, 1]  # rows of the chunk, expert by expert
        self.projected_PS: list[torch.Tensor] = []  # outputs of the up projection, then of the gate

    def experts(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yields each expert that runs, its pairs, and their rows."""
        begin = 0
        for e, count in enumerate(self.counts):
            if count:
                pairs = slice(begin, begin + count)
                yield e, pairs, self.rows_P[pairs]
            begin += count

    def gather(self, x_ND: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a function that fetches rows of the chunk, always into the same memory."""
        own_rows, memory = x_ND[self.tokens], x_ND.new_empty(max(self.counts), x_ND.shape[1])
        return lambda rows: torch.index_select(own_rows, 0, rows, out=memory[: len(rows)])

    def add(self, sums_ND: torch.Tensor) -> Callable[[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]], None]:
        """Returns a function that adds products of matrices to rows of the chunk, each row once."""
        own_rows, fetch = sums_ND[self.tokens], self.gather(sums_ND)

        def add(rows: torch.Tensor, products: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            sums = fetch(rows)
            for left, right in products:
                _add_product(sums, left, right)
            own_rows.index_copy_(0, rows, sums)

        return add


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        mask_NE: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        up_ESD: torch.Tensor,
        up_bias_ES: torch.Tensor | None,
        gate_ESD: torch.Tensor | None,
        gate_bias_ES: torch.Tensor | None,
        down_ESD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_ND, up_ESD, gate_ESD, down_ESD)
        ctx.activation = activation
        halves = [(up_ESD, up_bias_ES)] + ([] if gate_ESD is None else [(gate_ESD, gate_bias_ES)])
        out_ND = x_ND.new_zeros(x_ND.shape, dtype=_sums(x_ND.dtype))
        down_ESD = down_ESD.contiguous()  # strides of a whole row would be slow
        step = max(min(_CHUNK, -(-len(x_ND) // torch.get_num_threads())), 1)
        ranges = [slice(begin, min(begin + step, len(x_ND))) for begin in range(0, len(x_ND), step)]

        def compute(chunk: _Chunk) -> None:
            gather, add = chunk.gather(x_ND), chunk.add(out_ND)
            chunk.projected_PS = [x_ND.new_empty(len(chunk.rows_P), up_ESD.shape[1]) for _ in halves]
            for e, pairs, rows in chunk.experts():
                inputs = gather(rows)
                for (weight, bias), projected in zip(halves, chunk.projected_PS, strict=True):
                    if bias is None:
                        torch.mm(inputs, weight[e].T, out=projected[pairs])
                    else:
                        torch.addmm(bias[e], inputs, weight[e].T, out=projected[pairs])
            _, hidden_PS = hidden_activations(activation, *chunk.projected_PS)
            for e, pairs, rows in chunk.experts():
                add(rows, [(hidden_PS[pairs], down_ESD[e])])

        ctx.chunks = [_Chunk(mask_NE, tokens) for tokens in ranges]
        _on_all_threads(compute, ctx.chunks)
        return out_ND.to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # the second derivative would silently lack a part
            raise UserError(
                "skipped experts have no second derivative (create_graph=True); set model.skip_experts to false"
            )
        x_ND, up_ESD, gate_ESD, down_ESD = ctx.saved_tensors
        wants_x, _, _, *wants = ctx.needs_input_grad
        halves = [up_ESD] + ([] if gate_ESD is None else [gate_ESD])
        in_ND = x_ND.new_zeros(x_ND.shape, dtype=_sums(x_ND.dtype)) if wants_x else None
        shapes = [up_ESD.shape, up_ESD.shape[:2], up_ESD.shape, up_ESD.shape[:2], down_ESD.shape]
        down_ESD = down_ESD.contiguous()
        # Each thread has its own gradients, to which its chunks add.
        threads = min(torch.get_num_threads(), len(ctx.chunks))
        wanted = [shape if wants_it else None for shape, wants_it in zip(shapes, wants, strict=True)]
        totals = [
            [None if shape is None else x_ND.new_zeros(shape, dtype=_sums(x_ND.dtype)) for shape in wanted]
            for _ in range(max(threads, 1))
        ]

        def compute(share: int) -> None:
            *grad_halves, grad_down = totals[share]  # of up: weight, bias; of gate: weight, bias
            for chunk in ctx.chunks[share::threads]:
                gather, gather_grad = chunk.gather(x_ND), chunk.gather(grad_ND)
                with torch.enable_grad():
                    leaves = [projected.detach().requires_grad_() for projected in chunk.projected_PS]
                    _, hidden_PS = hidden_activations(ctx.activation, *leaves)
                grad_hidden_PS = torch.empty_like(hidden_PS)
                for e, pairs, rows in chunk.experts():
                    grads = gather_grad(rows)
                    torch.mm(grads, down_ESD[e].T, out=grad_hidden_PS[pairs])
                    if grad_down is not None:
                        _add_product(grad_down[e], hidden_PS.detach()[pairs].T, grads)
                grads_projected = torch.autograd.grad(hidden_PS, leaves, grad_hidden_PS)
                del hidden_PS, leaves, grad_hidden_PS
                add = None if in_ND is None else chunk.add(in_ND)
                for e, pairs, rows in chunk.experts():
                    inputs = gather(rows)
                    for i, grad in enumerate(grads_projected):
                        grad_weight, grad_bias = grad_halves[2 * i : 2 * i + 2]
                        if grad_weight is not None:
                            _add_product(grad_weight[e], grad[pairs].T, inputs)
                        if grad_bias is not None:
                            grad_bias[e] += grad[pairs].sum(dim=0)
                    if add is not None:
                        add(
                            rows,
                            [(grad[pairs], weight[e]) for grad, weight in zip(grads_projected, halves, strict=True)],
                        )

        _on_all_threads(compute, range(threads))
        for others in totals[1:]:
            for total, other in zip(totals[0], others, strict=True):
                if total is not None:
                    total += other
        results = [None if tensor is None else tensor.to(x_ND.dtype) for tensor in (in_ND, *totals[0])]
        return (results[0], None, None, *results[1:])


def _sums(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def _on_all_threads(compute: Callable[[T], None], parts: Sequence[T]) -> None:
    """Computes each part on one thread, on all of torch's threads. A part's products are too small to share."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        for part in parts:
            compute(part)
        return

    def alone(part: T) -> None:
        with torch.no_grad():  # each thread has its own mode
            compute(part)

    # torch keeps this number per thread, but MKL has one number for the process, which is restored at the end.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in pool.map(alone, parts):
                pass
        finally:
            torch.set_num_threads(threads)

"""Inputs and activations of a dense model's FFNs, for baselines that learn or calibrate from them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import nn

from lte_lightning.core.model.experts import ExpertFfn, require_expert_ffns, set_mode
from lte_lightning.core.model.parts import weight_rows
from lte_lightning.core.routing.prune import Batch
from lte_lightning.errors import UserError
from lte_lightning.selection import Activity, Selector

See = Callable[[ExpertFfn, Activity], None]


@contextmanager
def observe(model: nn.Module, see: See, *token_masks_BT: torch.Tensor) -> Iterator[None]:
    """Puts the model in dense mode, and reports its FFNs' activity on real tokens within a ``with`` block.

    Args:
        model: A converted model; its mode is ``dense`` afterwards.
        see: Called once for each FFN and forward pass.
        *token_masks_BT: True (or 1) for real tokens; for an encoder-decoder, a mask for each stack.

    Raises:
        UserError: If the model was not converted; in a forward pass, if the mask does not have the tokens' shape.
    """
    ffns = list(require_expert_ffns(model).values())
    set_mode(model, "dense")
    with watch(ffns, see, *token_masks_BT):
        yield


@contextmanager
def watch(ffns: Sequence[ExpertFfn], see: See, *token_masks_BT: torch.Tensor) -> Iterator[None]:
    """Reports the activity of some FFNs in mode ``dense`` on real tokens within a ``with`` block.

    Args:
        ffns: The FFNs; the caller sets the mode of all others.
        see: As for `observe`.
        *token_masks_BT: As for `observe`.

    Raises:
        UserError: In a forward pass, if the mask does not have the tokens' shape.
    """

    def show(ffn: ExpertFfn, x_BTD: torch.Tensor, gate_BTF: torch.Tensor, hidden_BTF: torch.Tensor) -> None:
        mask_BT = token_masks_BT[ffn.stack]
        if x_BTD.shape[:-1] not in (mask_BT.shape, (mask_BT.numel(),)):  # OPT flattens its tokens
            raise UserError(f"the token mask has shape {tuple(mask_BT.shape)}, the tokens {tuple(x_BTD.shape[:-1])}")
        real_N = mask_BT.flatten().bool()
        x_ND, gate_NF, hidden_NF = (tensor.flatten(0, -2)[real_N] for tensor in (x_BTD, gate_BTF, hidden_BTF))
        first_FD = weight_rows(ffn.up if ffn.gate is None else ffn.gate).detach()
        see(ffn, Activity(x_ND, gate_NF, hidden_NF, first_FD, weight_rows(ffn.down).detach().T))

    for ffn in ffns:
        ffn.observer = show
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.observer = None


def selectors(model: nn.Module) -> list[Selector]:
    """Returns the selectors of a model, one per FFN, all of the same class."""
    return [ffn.selector for ffn in require_expert_ffns(model).values()]


def learns(model: nn.Module) -> bool:
    """Whether the model's selectors are trained at all."""
    return selectors(model)[0].learns != "never"


def imitates(model: nn.Module) -> bool:
    """Whether the model's selectors learn from the dense model's activations, not with the task."""
    return selectors(model)[0].learns == "imitation"


def balances(model: nn.Module) -> bool:
    """Whether the model's selectors have a balance loss in place of equation 6's two terms."""
    return selectors(model)[0].learns == "balance"


def learns_with_task(model: nn.Module) -> bool:
    """Whether the model's selectors are trained with the task, as LTE's routers and gates are."""
    return selectors(model)[0].learns_with_task()


def imitation_loss(
    model: nn.Module, run: Callable[[], object], *token_masks_BT: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the loss of the layers' predictors, averaged over layers; only the predictors get a gradient.

    Args:
        model: A model whose selectors learn by imitation.
        run: Runs the model once.
        *token_masks_BT: As for `observe`.
        weights: Factors of the losses, one per stack.
    """
    losses = []

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        with torch.enable_grad():
            loss = ffn.selector.imitation_loss(activity)
            losses.append(loss if weights is None else loss * weights[ffn.stack])

    with observe(model, see, *token_masks_BT), torch.no_grad():
        run()
    return torch.stack(losses).mean()


def neuron_activations(
    model: nn.Module,
    batches: Iterator[Batch],
    tokens: int,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
) -> list[torch.Tensor]:
    """Returns the absolute activations of each FFN's neurons on training rows, [F, tokens], in bfloat16 on the CPU.

    Args:
        model: A converted model.
        batches: For each batch, a function that runs the model on it, and its token masks.
        tokens: The largest number of tokens to read, on each device.
        reduce: Sums counts over devices, which read equally many batches.

    Raises:
        UserError: If the rows hold no token.
    """
    seen: dict[int, list[torch.Tensor]] = {id(ffn): [] for ffn in require_expert_ffns(model).values()}

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        seen[id(ffn)].append(activity.hidden_NF.abs().to("cpu", torch.bfloat16))

    with torch.no_grad():
        for run, token_masks_BT in take_tokens(batches, tokens, reduce):
            with observe(model, see, *token_masks_BT):
                run()
    if not all(any(map(len, kept)) for kept in seen.values()):
        raise UserError("the training rows hold no tokens, so there are no activations to read")
    return [torch.cat(kept)[:tokens].T for kept in seen.values()]


def take_tokens(
    batches: Iterator[Batch], tokens: int, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts
) -> Iterator[Batch]:
    """Yields batches until every stack has seen this many tokens; ``reduce`` sums the count over devices."""
    counts: list[int] = []
    for run, token_masks_BT in batches:
        yield run, token_masks_BT
        counts = [sum(pair) for pair in zip_longest(counts, (int(mask.sum()) for mask in token_masks_BT), fillvalue=0)]
        if not int(reduce(token_masks_BT[0].new_tensor(min(counts) < tokens, dtype=torch.long))):
            return

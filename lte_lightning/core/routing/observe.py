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
    """Runs the model densely within a ``with`` block, and shows its FFNs' activity on real tokens.

    Args:
        model: A converted model; its mode is ``dense`` afterwards.
        see: Called once for each FFN and forward pass.
        *token_masks_BT: True (or 1) for real tokens; of an encoder-decoder the encoder's and the decoder's.

    Raises:
        UserError: If the model was not converted; in a forward pass, if the mask has another shape than the tokens.
    """
    ffns = list(require_expert_ffns(model).values())
    set_mode(model, "dense")
    with watch(ffns, see, *token_masks_BT):
        yield


@contextmanager
def watch(ffns: Sequence[ExpertFfn], see: See, *token_masks_BT: torch.Tensor) -> Iterator[None]:
    """Shows what some FFNs, which are in mode ``dense``, do on real tokens for the time of a ``with`` block.

    Args:
        ffns: The FFNs; what mode the others are in is left to the caller.
        see: As for `observe`.
        *token_masks_BT: As for `observe`.

    Raises:
        UserError: In a forward pass, if the mask has another shape than the tokens.
    """

    def show(ffn: ExpertFfn, x_BTD: torch.Tensor, gate_BTF: torch.Tensor, hidden_BTF: torch.Tensor) -> None:
        mask_BT = token_masks_BT[ffn.stack]
        if x_BTD.shape[:-1] not in (mask_BT.shape, (mask_BT.numel(),)):  # OPT hands over its tokens in one row
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
    """Returns the selectors of a model, one of each FFN; all are of the same class."""
    return [ffn.selector for ffn in require_expert_ffns(model).values()]


def learns(model: nn.Module) -> bool:
    """Says whether the model's selectors are trained at all."""
    return selectors(model)[0].learns != "never"


def imitates(model: nn.Module) -> bool:
    """Says whether the model's selectors learn from the dense model's activations instead of with the task."""
    return selectors(model)[0].learns == "imitation"


def balances(model: nn.Module) -> bool:
    """Says whether the model's selectors have a balance loss, instead of equation 6's two terms."""
    return selectors(model)[0].learns == "balance"


def learns_with_task(model: nn.Module) -> bool:
    """Says whether the model's selectors are trained with the task: LTE's routers, and gates."""
    return selectors(model)[0].learns_with_task()


def imitation_loss(
    model: nn.Module, run: Callable[[], object], *token_masks_BT: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mean over the layers of their predictors' loss; nothing but the predictors gets a gradient.

    Args:
        model: Whose selectors learn by imitation.
        run: Runs the model once.
        *token_masks_BT: As for `observe`.
        weights: Multiply the losses of each stack's layers, one weight per stack.
    """
    losses = []

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        with torch.enable_grad():
            loss = ffn.selector.imitation_loss(activity)
            losses.append(loss if weights is None else loss * weights[ffn.stack])

    with observe(model, see, *token_masks_BT), torch.no_grad():
        run()
    return torch.stack(losses).mean()


def neuron_activations(model: nn.Module, batches: Iterator[Batch], tokens: int) -> list[torch.Tensor]:
    """Returns the |activations| of each FFN's neurons on training rows, [F, tokens], in bfloat16 on the CPU.

    Args:
        model: A converted model.
        batches: For each batch what runs the model on it, and its token masks.
        tokens: How many to look at, or fewer if there are no more.

    Raises:
        UserError: If there is no token.
    """
    seen: dict[int, list[torch.Tensor]] = {id(ffn): [] for ffn in require_expert_ffns(model).values()}

    def see(ffn: ExpertFfn, activity: Activity) -> None:
        seen[id(ffn)].append(activity.hidden_NF.abs().to("cpu", torch.bfloat16))

    with torch.no_grad():
        for run, token_masks_BT in enough(batches, tokens):
            with observe(model, see, *token_masks_BT):
                run()
    if not all(any(map(len, kept)) for kept in seen.values()):
        raise UserError("the training rows gave no token to see the neurons' activations on")
    return [torch.cat(kept)[:tokens].T for kept in seen.values()]


def enough(
    batches: Iterator[Batch], tokens: int, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts
) -> Iterator[Batch]:
    """Yields batches until they hold so many tokens in every stack; with ``reduce``, a sum, on every device."""
    counts: list[int] = []
    for run, token_masks_BT in batches:
        yield run, token_masks_BT
        counts = [sum(pair) for pair in zip_longest(counts, (int(mask.sum()) for mask in token_masks_BT), fillvalue=0)]
        if not int(reduce(token_masks_BT[0].new_tensor(min(counts) < tokens, dtype=torch.long))):
            return

"""What the FFNs of a dense model do: its inputs and activations, for baselines that learn or calibrate from them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.convert import require_expert_ffns, set_mode
from lte_lightning.core.errors import UserError
from lte_lightning.core.expert_ffn import ExpertFfn
from lte_lightning.core.ffn import weight_rows
from lte_lightning.core.prune import Batch, prune
from lte_lightning.selection import Gates, Predictor, Ranking, Router, Teal, Wanda

# See an FFN's input x_ND, its activated gate and its hidden activations [N, F], of N real tokens.
See = Callable[[ExpertFfn, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def observe(model: nn.Module, see: See, *token_masks_BT: torch.Tensor) -> Iterator[None]:
    """Runs the model densely for the time of a ``with`` block and shows what its FFNs do on real tokens.

    Args:
        model: A converted model; its mode is ``dense`` afterwards.
        see: Called once for each FFN and forward pass.
        *token_masks_BT: True (or 1) for real tokens; of an encoder-decoder the encoder's and the decoder's.

    Raises:
        UserError: If the model was not converted; in a forward pass, if the mask has another shape than the tokens.
    """
    ffns = require_expert_ffns(model)

    def show(ffn: ExpertFfn, x_BTD: torch.Tensor, gate_BTF: torch.Tensor, hidden_BTF: torch.Tensor) -> None:
        mask_BT = token_masks_BT[ffn.stack]
        if x_BTD.shape[:-1] not in (mask_BT.shape, (mask_BT.numel(),)):  # OPT hands over its tokens in one row
            raise UserError(f"the token mask has shape {tuple(mask_BT.shape)}, the tokens {tuple(x_BTD.shape[:-1])}")
        real_N = mask_BT.flatten().bool()
        see(ffn, *(tensor.flatten(0, -2)[real_N] for tensor in (x_BTD, gate_BTF, hidden_BTF)))

    set_mode(model, "dense")
    for ffn in ffns.values():
        ffn.observer = show
    try:
        yield
    finally:
        for ffn in ffns.values():
            ffn.observer = None


def rankings(model: nn.Module) -> list[Ranking]:
    """Returns the baselines' selectors of a model; empty with LTE's routers."""
    selectors = [ffn.selector for ffn in require_expert_ffns(model).values()]
    return [selector for selector in selectors if isinstance(selector, Ranking)]


def needs_calibration(model: nn.Module) -> bool:
    """Says whether the model's selectors must be calibrated on training rows."""
    return any(ranking.calibrates for ranking in rankings(model))


def imitates(model: nn.Module) -> bool:
    """Says whether the model's selectors are trained on what the dense model does, instead of with the task."""
    return any(isinstance(selector, Predictor) for selector in rankings(model))


def balances(model: nn.Module) -> bool:
    """Says whether the model's selectors have a balance loss, instead of equation 6's two terms."""
    return any(isinstance(selector, Gates) for selector in rankings(model))


def learns_with_task(model: nn.Module) -> bool:
    """Says whether the model's selectors are trained with the task: LTE's routers, and gates."""
    return all(isinstance(ffn.selector, Router | Gates) for ffn in require_expert_ffns(model).values())


def imitation_loss(model: nn.Module, run: Callable[[], object], *token_masks_BT: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the layers of their predictors' loss; nothing but the predictors gets a gradient.

    Args:
        model: Whose selectors are `Predictor`s.
        run: Runs the model once.
        *token_masks_BT: As for `observe`.
    """
    losses = []

    def see(ffn: ExpertFfn, x_ND: torch.Tensor, gate_NF: torch.Tensor, hidden_NF: torch.Tensor) -> None:
        down_FD = weight_rows(ffn.down).T
        if isinstance(ffn.selector, Predictor):
            with torch.enable_grad():
                losses.append(ffn.selector.imitation_loss(x_ND, hidden_NF, down_FD.detach()))

    with observe(model, see, *token_masks_BT), torch.no_grad():
        run()
    return torch.stack(losses).mean()


def calibrate(model: PreTrainedModel, batches: Iterator[Batch], tokens: int) -> None:
    """Calibrates every ranking that needs it on training rows; of Wanda it prunes the model.

    Args:
        model: A converted model, in eval mode.
        batches: For each batch what runs the model on it, and its token masks.
        tokens: How many to calibrate on; batches are run until there are as many.
    """
    wanted = [ranking for ranking in rankings(model) if ranking.calibrates]
    if not wanted:
        return
    if isinstance(wanted[0], Wanda):
        prune(model, list(_enough(batches, tokens)))
        return
    seen: dict[int, list[torch.Tensor]] = {id(ranking): [] for ranking in wanted}

    def see(ffn: ExpertFfn, x_ND: torch.Tensor, gate_NF: torch.Tensor, hidden_NF: torch.Tensor) -> None:
        given = {"input": x_ND, "gate": gate_NF, "hidden": hidden_NF}[ffn.selector.reads]
        if isinstance(ffn.selector, Teal):
            seen[id(ffn.selector)].append(x_ND.cpu())
        elif isinstance(ffn.selector, Ranking):
            seen[id(ffn.selector)].append(ffn.selector.importance(given).cpu())

    with torch.no_grad():
        for run, token_masks_BT in _enough(batches, tokens):
            with observe(model, see, *token_masks_BT):
                run()
    for ffn in require_expert_ffns(model).values():
        found = torch.cat(seen[id(ffn.selector)])[:tokens]
        if isinstance(ffn.selector, Teal):
            _allocate(ffn, ffn.selector, found.to(ffn.up.weight.device))
        elif isinstance(ffn.selector, Ranking):
            ffn.selector.calibrate(found)


def neuron_activations(model: nn.Module, batches: Iterator[Batch], tokens: int) -> list[torch.Tensor]:
    """Returns the |activations| of each FFN's neurons on training rows, [F, tokens], in bfloat16 on the CPU.

    Args:
        model: A converted model.
        batches: As for `calibrate`.
        tokens: How many to look at, or fewer if there are no more.

    Raises:
        UserError: If there is no token.
    """
    seen: dict[int, list[torch.Tensor]] = {id(ffn): [] for ffn in require_expert_ffns(model).values()}

    def see(ffn: ExpertFfn, x_ND: torch.Tensor, gate_NF: torch.Tensor, hidden_NF: torch.Tensor) -> None:
        seen[id(ffn)].append(hidden_NF.abs().to("cpu", torch.bfloat16))

    with torch.no_grad():
        for run, token_masks_BT in _enough(batches, tokens):
            with observe(model, see, *token_masks_BT):
                run()
    if not all(any(map(len, kept)) for kept in seen.values()):
        raise UserError("the training rows gave no token to see the neurons' activations on")
    return [torch.cat(kept)[:tokens].T for kept in seen.values()]


def _allocate(ffn: ExpertFfn, teal: Teal, x_ND: torch.Tensor) -> None:
    """Runs the FFN on its inputs with the levels that are tried."""
    hiddens: list[torch.Tensor] = []
    with torch.no_grad():
        ffn.observer = lambda *given: hiddens.append(given[-1])
        dense_ND = ffn(x_ND)
        ffn.observer, ffn.mode = None, "hard"
        teal.allocate(x_ND, hiddens[0], dense_ND, lambda: ffn(x_ND))
    ffn.mode = "dense"


def _enough(batches: Iterator[Batch], tokens: int) -> Iterator[Batch]:
    """The batches until they hold so many tokens in every stack."""
    counts: list[int] = []
    for run, token_masks_BT in batches:
        yield run, token_masks_BT
        counts = [sum(pair) for pair in zip_longest(counts, (int(mask.sum()) for mask in token_masks_BT), fillvalue=0)]
        if min(counts) >= tokens:
            return

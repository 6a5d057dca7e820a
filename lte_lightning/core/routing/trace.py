"""Records the router scores of forward passes, and counts the experts that run."""

from types import TracebackType
from typing import Self

import torch
from torch import nn

from lte_lightning.core.model.experts import ExpertFfn, require_expert_ffns
from lte_lightning.core.routing.losses import SEPARABILITY_EPSILON, efficiency_loss, separability_loss
from lte_lightning.core.routing.sparsity import Counts
from lte_lightning.errors import UserError


class RouterTrace:
    """Collects the routers' scores of the real tokens while the context is open.

    >>> with RouterTrace(model, attention_mask) as trace:
    ...     loss = model(**batch).loss
    >>> (loss + eta * trace.efficiency_loss()).backward()

    A layer that gradient checkpointing computes again in the backward pass is counted once.

    Args:
        model: A converted model, in mode ``soft`` or ``hard``.
        token_mask_BT: True (or 1) for real tokens; padding is excluded from everything here. None means that all tokens
            are real. For an encoder-decoder, this is the encoder's mask.
        decoder_mask_BT: The decoder's mask of an encoder-decoder; ``labels != -100`` in training.

    Raises:
        UserError: If the model was not converted, or only one of two stacks has a mask; in a forward pass, if a mask
            does not have the tokens' shape.
        RuntimeError: If the model is already traced; in a forward pass, if its scores lost their gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        token_mask_BT: torch.Tensor | None = None,
        decoder_mask_BT: torch.Tensor | None = None,
    ) -> None:
        self._ffns = require_expert_ffns(model)
        self._names = {id(ffn): name for name, ffn in self._ffns.items()}
        self._masks = [None if mask is None else mask.bool() for mask in (token_mask_BT, decoder_mask_BT)]
        has_decoder = any(ffn.stack for ffn in self._ffns.values())
        # in an encoder-decoder, only the decoder sees a row token by token
        can_generate = getattr(model, "can_generate", None)
        self._decodes = int(has_decoder) if can_generate and can_generate() else None
        if not has_decoder and decoder_mask_BT is not None:
            raise UserError(
                f"decoder_mask_BT is for models with encoder and decoder; {type(model).__name__} has one stack"
            )
        if has_decoder and (token_mask_BT is None) != (decoder_mask_BT is None):
            raise UserError(
                f"{type(model).__name__} has an encoder and a decoder; give both token_mask_BT (the encoder's) and "
                "decoder_mask_BT (labels != -100, or ones), or neither if no token is padding"
            )
        self._recorded: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._scores: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._used: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}  # of selectors to be balanced
        self._shapes: dict[str, list[torch.Size]] = {name: [] for name in self._ffns}

    def __enter__(self) -> Self:
        if any(ffn.recorder is not None for ffn in self._ffns.values()):
            raise RuntimeError("this model is already traced; close the other RouterTrace first")
        for ffn in self._ffns.values():
            ffn.recorder = self._record
        self._grad_enabled = torch.is_grad_enabled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for ffn in self._ffns.values():
            ffn.recorder = None

    def _record(self, ffn: ExpertFfn, scores_BTE: torch.Tensor, x_BTD: torch.Tensor) -> None:
        # a backward pass is recomputing this layer; a compiled one records once
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if self._grad_enabled and ffn.training and not scores_BTE.requires_grad and _trainable(ffn.selector):
            raise RuntimeError(
                "the scores carry no gradient although the router is trainable. Reentrant gradient checkpointing hides "
                "it: pass {'use_reentrant': False} when you enable checkpointing. To count without gradients, enter "
                "torch.no_grad() before the trace"
            )
        mask_BT, tokens = self._masks[ffn.stack], scores_BTE.shape[:-1]
        # OPT hands its tokens over as one list.
        if mask_BT is not None and tokens not in (mask_BT.shape, (mask_BT.numel(),)):
            which = "decoder" if ffn.stack else "token"
            raise UserError(f"the {which} mask has shape {tuple(mask_BT.shape)}, the tokens {tuple(tokens)}")
        # The mask is applied later: gradient checkpointing must repeat the same operations here.
        self._recorded[self._names[id(ffn)]].append(scores_BTE)
        used_BT1 = ffn.selector.weight_share(x_BTD, scores_BTE)
        if used_BT1 is not None:
            self._used[self._names[id(ffn)]].append(used_BT1)
        if self._grad_enabled and ffn.selector.learns == "balance":
            self._inputs[self._names[id(ffn)]].append(x_BTD)

    def _real(self, scores_BTE: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        scores_NE = scores_BTE.flatten(0, -2)
        return scores_NE if mask_BT is None else scores_NE[mask_BT.flatten()]

    def scores(self) -> dict[str, torch.Tensor]:
        """Returns each layer's scores [N, E] of the N real tokens, float32, with their graph.

        Raises:
            RuntimeError: If a layer did not run, or ran in mode ``dense``.
            UserError: If no token was real.
        """
        for name, recorded in self._recorded.items():
            mask_BT = self._masks[self._ffns[name].stack]
            self._scores[name] += [self._real(scores_BTE, mask_BT) for scores_BTE in recorded]
            self._shapes[name] += [scores_BTE.shape[:-1] for scores_BTE in recorded]
            recorded.clear()
        silent = [name for name, records in self._scores.items() if not records]
        if silent:
            raise RuntimeError(
                f"{silent[0]} recorded no scores ({len(silent)} of {len(self._scores)} layers); run the model "
                "inside the trace, in mode 'soft' or 'hard'"
            )
        scores = {name: torch.cat(records) for name, records in self._scores.items()}
        empty = [name for name, scores_NE in scores.items() if scores_NE.shape[0] == 0]
        if empty:
            which = "decoder" if self._ffns[empty[0]].stack else "token"
            raise UserError(f"there is no real token: the {which} mask is all zeros")
        return scores

    def efficiency_loss(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Returns equation 4 over the real tokens.

        Args:
            weights: Factor of each stack's mean, one per stack (two for an encoder-decoder): the share of this batch in
                the tokens of an optimizer step over several batches.
        """
        return efficiency_loss(list(self.scores().values()), self._by_layer(weights))

    def separability_loss(
        self, epsilon: float = SEPARABILITY_EPSILON, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns equation 5 over the real tokens, at the model's threshold; ``weights`` as for `efficiency_loss`."""
        threshold = next(iter(self._ffns.values())).trained_threshold
        return separability_loss(list(self.scores().values()), threshold, epsilon, self._by_layer(weights))

    def _by_layer(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        return None if weights is None else weights[[ffn.stack for ffn in self._ffns.values()]]

    def balance_loss(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the selectors' balance losses over the real tokens, at their method's weight, summed over layers.

        The model's selectors must have such a loss, and the trace must record with gradients enabled. ``weights`` as
        for `efficiency_loss`.
        """
        losses = []
        for name, gates_NE in self.scores().items():
            selector, mask_BT = self._ffns[name].selector, self._masks[self._ffns[name].stack]
            x_ND = torch.cat([self._real(x_BTD, mask_BT) for x_BTD in self._inputs[name]])
            weight = selector.balance_weight * (1.0 if weights is None else weights[self._ffns[name].stack])
            losses.append(weight * selector.balance_loss(x_ND, gates_NE))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def counts(self) -> Counts:
        """Returns the number of (token, expert) pairs that run in each layer in hard mode, and the tokens it has seen.

        If a selector reports the share of the weights that a token uses, pairs count by that share.
        """
        scores, active = self.scores(), []
        for name, scores_NE in scores.items():
            if self._used[name]:
                mask_BT = self._masks[self._ffns[name].stack]
                shares = torch.stack([self._real(used_BT1, mask_BT).sum() for used_BT1 in self._used[name]]).sum()
                active.append((shares * scores_NE.shape[1]).round().long())
            else:
                active.append((scores_NE > self._ffns[name].threshold).sum())
        tokens = [len(scores_NE) for scores_NE in scores.values()]
        active_L = torch.stack(active)
        tokens_L = torch.tensor(tokens, device=active_L.device)
        return Counts(active_L, tokens_L, [ffn.experts for ffn in self._ffns.values()])

    def active_counts(self) -> tuple[torch.Tensor, int]:
        """Returns the number of (token, expert) pairs that run in each layer in hard mode, [L] int64, and N tokens.

        With an encoder and a decoder, N is the encoder's; `counts` has the decoder's.
        """
        counts = self.counts()
        return counts.active_L, int(counts.tokens_L[0])

    @torch.no_grad()
    def idle_experts(self, sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts the experts that no token of a batch needs in hard mode (the paper's figure 15), by batch size.

        Batches are of 1, 2, 4, ... neighbouring rows. For a model that generates, a batch is one decoding step: the
        token of each row at one position (counted from the row's first real token), until the first row ends. Encoders,
        and models that do not generate, see all real tokens of the rows at once.

        Args:
            sizes: Number K of batch sizes; the largest is 2^(K-1).

        Returns:
            The idle (batch, expert) pairs of each layer and size, [L, K] int64, and the number of counted batches,
            [L, K] int64, which is 0 for sizes above the number of rows.

        Raises:
            UserError: If the model flattens its tokens (OPT), and no mask says where the rows end.
        """
        self.scores()  # takes in what was recorded since
        counts_L = []
        for name, ffn in self._ffns.items():
            mask_BT, counts = self._masks[ffn.stack], []
            for scores_NE, shape in zip(self._scores[name], self._shapes[name], strict=True):
                if mask_BT is None and len(shape) != 2:
                    raise UserError(f"{name} flattens its rows; pass token_mask_BT to RouterTrace to tell them apart")
                real_BT = scores_NE.new_ones(shape, dtype=torch.bool) if mask_BT is None else mask_BT
                counts.append(_union_counts(scores_NE > ffn.threshold, real_BT, sizes, ffn.stack == self._decodes))
            counts_L.append(torch.stack(counts).sum(0))
        idle_LK, batches_LK = torch.stack(counts_L).unbind(1)
        return idle_LK, batches_LK

    def sparsity(self) -> float:
        """Returns the share of FFN neurons (or weights) that do not run in hard mode, over real tokens and layers."""
        return self.counts().sparsity()


def _union_counts(active_NE: torch.Tensor, real_BT: torch.Tensor, sizes: int, decodes: bool) -> torch.Tensor:
    """Returns one layer's idle (batch, expert) pairs and its batches of 1, 2, 4, ... rows, [2, K]."""
    position_BT = real_BT.cumsum(1) - 1
    steps = int(position_BT.max()) + 1
    rows, columns = real_BT.nonzero(as_tuple=True)
    active_BTE = active_NE.new_zeros(real_BT.shape[0], steps, active_NE.shape[1])
    active_BTE[rows, position_BT[rows, columns]] = active_NE
    there_BT = torch.arange(steps, device=real_BT.device) < real_BT.sum(1, keepdim=True)
    if not decodes:
        active_BTE, there_BT = active_BTE.any(1, keepdim=True), there_BT.any(1, keepdim=True)
    counts = []
    for _ in range(sizes):
        counts.append(torch.stack([(~active_BTE & there_BT.unsqueeze(-1)).sum(), there_BT.sum()]))
        even = len(there_BT) // 2 * 2  # a last row without a neighbour joins no larger batch
        active_BTE = active_BTE[:even:2] | active_BTE[1:even:2]
        there_BT = there_BT[:even:2] & there_BT[1:even:2]
    return torch.stack(counts, dim=1)


def _trainable(selector: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in selector.parameters())

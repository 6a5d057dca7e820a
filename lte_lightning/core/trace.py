"""Router statistics of one forward pass."""

from types import TracebackType
from typing import Self

import torch
from torch import nn

from lte_lightning.core.convert import require_expert_ffns
from lte_lightning.core.errors import UserError
from lte_lightning.core.expert_ffn import ExpertFfn
from lte_lightning.core.losses import SEPARABILITY_EPSILON, efficiency_loss, separability_loss
from lte_lightning.selection import Gates


class RouterTrace:
    """Collects the scores of the real tokens while it is open.

    >>> with RouterTrace(model, attention_mask) as trace:
    ...     loss = model(**batch).loss
    >>> (loss + eta * trace.efficiency_loss()).backward()

    What is computed again during a backward pass (gradient checkpointing) is not counted again.

    Args:
        model: A converted model, in mode ``soft`` or ``hard``.
        token_mask_BT: True (or 1) for real tokens; padding is excluded from everything here. None: all are real. Of a
            model with an encoder and a decoder, the encoder's.
        decoder_mask_BT: The decoder's mask, of a model with an encoder too; ``labels != -100`` where it is trained.

    Raises:
        UserError: If the model was not converted, or one of its stacks is given no mask and the other is; in a forward
            pass, if a mask is not of the tokens' shape.
        RuntimeError: If the model is being traced already; in a forward pass, if its scores lost their gradient.
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
        if not has_decoder and decoder_mask_BT is not None:
            raise UserError(
                f"decoder_mask_BT is for models with encoder and decoder; {type(model).__name__} has one stack"
            )
        if has_decoder and (token_mask_BT is None) != (decoder_mask_BT is None):
            raise UserError(
                f"{type(model).__name__} has an encoder and a decoder: give both token_mask_BT (the encoder's) and "
                "decoder_mask_BT (labels != -100, or ones), or neither if no token is padding"
            )
        self._recorded: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._scores: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._used: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}
        self._inputs: dict[str, list[torch.Tensor]] = {name: [] for name in self._ffns}  # of selectors to be balanced

    def __enter__(self) -> Self:
        if any(ffn.recorder is not None for ffn in self._ffns.values()):
            raise RuntimeError("this model is traced already; close the other RouterTrace first")
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
        if torch._C._current_graph_task_id() != -1:  # a backward pass is recomputing this layer
            return
        if self._grad_enabled and ffn.training and not scores_BTE.requires_grad and _trainable(ffn.selector):
            raise RuntimeError(
                "the scores carry no gradient although the router is trainable: reentrant gradient checkpointing "
                "hides it, pass {'use_reentrant': False} when you enable checkpointing (for figures without gradients, "
                "enter torch.no_grad() before the trace)"
            )
        mask_BT, tokens = self._masks[ffn.stack], scores_BTE.shape[:-1]
        # OPT hands its tokens over as one list.
        if mask_BT is not None and tokens not in (mask_BT.shape, (mask_BT.numel(),)):
            which = "decoder" if ffn.stack else "token"
            raise UserError(f"the {which} mask has shape {tuple(mask_BT.shape)}, the tokens {tuple(tokens)}")
        # The mask is applied later: gradient checkpointing wants the same operations here when it computes again.
        self._recorded[self._names[id(ffn)]].append(scores_BTE)
        used_BT1 = ffn.selector.used(x_BTD, scores_BTE)
        if used_BT1 is not None:
            self._used[self._names[id(ffn)]].append(used_BT1)
        if self._grad_enabled and isinstance(ffn.selector, Gates):
            self._inputs[self._names[id(ffn)]].append(x_BTD)

    def _real(self, scores_BTE: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        scores_NE = scores_BTE.flatten(0, -2)
        return scores_NE if mask_BT is None else scores_NE[mask_BT.flatten()]

    def scores(self) -> dict[str, torch.Tensor]:
        """Returns each layer's scores [N, E] of the N real tokens, float32, with their graph.

        Raises:
            RuntimeError: If a layer did not run, or ran in mode ``dense``.
            UserError: If there was no real token.
        """
        for name, recorded in self._recorded.items():
            mask_BT = self._masks[self._ffns[name].stack]
            self._scores[name] += [self._real(scores_BTE, mask_BT) for scores_BTE in recorded]
            recorded.clear()
        silent = [name for name, records in self._scores.items() if not records]
        if silent:
            raise RuntimeError(
                f"no scores were seen from {silent[0]} ({len(silent)} of {len(self._scores)} layers): run the model "
                "inside the trace, in mode 'soft' or 'hard'"
            )
        scores = {name: torch.cat(records) for name, records in self._scores.items()}
        empty = [name for name, scores_NE in scores.items() if scores_NE.shape[0] == 0]
        if empty:
            which = "decoder" if self._ffns[empty[0]].stack else "token"
            raise UserError(f"no real token: the {which} mask is all zeros")
        return scores

    def efficiency_loss(self) -> torch.Tensor:
        """Returns equation 4 over the real tokens."""
        return efficiency_loss(list(self.scores().values()))

    def separability_loss(self, epsilon: float = SEPARABILITY_EPSILON) -> torch.Tensor:
        """Returns equation 5 over the real tokens, at the model's threshold."""
        threshold = next(iter(self._ffns.values())).threshold
        return separability_loss(list(self.scores().values()), threshold, epsilon)

    def balance_loss(self) -> torch.Tensor:
        """Returns the balance losses of `Gates` over the real tokens, each at its method's weight, summed over layers.

        For a model whose selectors are `Gates`, traced while gradients are enabled.
        """
        losses = []
        for name, gates_NE in self.scores().items():
            selector, mask_BT = self._ffns[name].selector, self._masks[self._ffns[name].stack]
            if isinstance(selector, Gates):
                x_ND = torch.cat([self._real(x_BTD, mask_BT) for x_BTD in self._inputs[name]])
                losses.append(selector.balance_weight * selector.balance_loss(x_ND, gates_NE))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def active_counts(self) -> tuple[torch.Tensor, int]:
        """Returns how many (token, expert) pairs run in each layer in hard mode, [L] int64, and the tokens N.

        With an encoder and a decoder, N is the encoder's; the decoder's is the length of its layers' `scores`. Where a
        selector says which share of the weights a token uses, that counts as the same share of the experts.
        """
        scores, counts = self.scores(), []
        for name, scores_NE in scores.items():
            if self._used[name]:
                mask_BT = self._masks[self._ffns[name].stack]
                shares = torch.stack([self._real(used_BT1, mask_BT).sum() for used_BT1 in self._used[name]]).sum()
                counts.append((shares * scores_NE.shape[1]).round().long())
            else:
                counts.append((scores_NE > self._ffns[name].threshold).sum())
        return torch.stack(counts), next(iter(scores.values())).shape[0]

    def sparsity(self) -> float:
        """Returns the share of FFN neurons (or weights) that do not run in hard mode, over real tokens and layers."""
        active_L, _ = self.active_counts()
        active = neurons = 0
        for n, (name, scores_NE) in zip(active_L, self.scores().items(), strict=True):
            active += int(n) * self._ffns[name].expert_size
            neurons += scores_NE.shape[0] * self._ffns[name].neurons
        return 1.0 - active / neurons


def _trainable(selector: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in selector.parameters())

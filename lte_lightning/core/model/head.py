"""Heads: which models classify, and a decoder's loss from the logits that have a label."""

from typing import Any

import torch
from torch.nn import functional

IGNORED = -100  # the label of what carries no loss


def classifies(kind: str) -> bool:
    """Says whether a model of transformers tells classes apart, or predicts a number, by the name of its class."""
    return kind.endswith("ForSequenceClassification")


def run_where_asked(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Runs a decoder, and its head only on the positions whose next token has a label.

    The loss and all gradients are those of ``model(**batch)``. Prompts and padding cost no logits, which in a small
    model with a large vocabulary are most of the work, and in any model much of the memory.

    Args:
        model: A Hugging Face model for causal language modelling.
        batch: Its inputs, with ``labels`` [B, T] of token ids, -100 where there is nothing to learn.

    Returns:
        The model's outputs: ``loss``, the mean over the N labels (NaN if there is none), and ``logits`` [1, N, V], the
        rows of the batch one after the other.
    """
    labels_BT = batch["labels"][:, 1:]  # nothing stands before the first token
    asked_BT = labels_BT != IGNORED

    def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0][:, :-1][asked_BT][None]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        hook.remove()
    outputs.loss = functional.cross_entropy(outputs.logits[0].float(), labels_BT[asked_BT])
    return outputs

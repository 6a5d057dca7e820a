"""Say whether a model's head classifies, and run a decoder's head only at labelled positions."""

from typing import Any

import torch
from torch.nn import functional

IGNORED = -100  # the label of a position without loss


def classifies(kind: str) -> bool:
    """Says, by the name of its class, whether a model of transformers classifies or predicts a number."""
    return kind.endswith("ForSequenceClassification")


def run_where_asked(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Runs a decoder, and its head only on the positions whose next token has a label.

    The loss and all gradients are those of ``model(**batch)``. Prompts and padding cost no logits. In a small model
    with a large vocabulary, logits are most of the work. In any model they take much of the memory.

    Args:
        model: A Hugging Face model for causal language modelling.
        batch: Its inputs, with ``labels`` [B, T] of token ids, -100 where there is nothing to learn.

    Returns:
        The model's outputs: ``loss``, the mean over the N labels (NaN if there is none), and ``logits`` [1, N, V], the
        rows of the batch one after the other.
    """
    labels_BT = batch["labels"][:, 1:]  # no position predicts the first token
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

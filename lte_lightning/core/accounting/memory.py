"""Memory of training, estimated before it starts."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import Projection, find_layers, weight_rows
from lte_lightning.errors import UserError

GIB = 2**30
# Bytes of a weight (of its gradient, and of each value that the optimizer keeps of it), and of an activation; autocast
# casts as well.
PRECISIONS = {
    "64-true": (8, 8),
    "32-true": (4, 4),
    "bf16-true": (2, 2),
    "16-true": (2, 2),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds on one device at its peak.

    Args:
        weights: The weights; under autocast with the half-precision copies of the projections.
        gradients: Of the trainable weights.
        optimizer: What the optimizer keeps of each trainable weight, AdamW its two moments.
        activations: What a forward pass keeps for the backward pass.
        activations_checkpointed: The same with gradient checkpointing.
        shared: What more than one device takes: DDP's copies of the gradients, FSDP2's gathered layers.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_checkpointed: int
    shared: int = 0

    def total(self, checkpointing: bool = False) -> int:
        """Returns the sum, with or without gradient checkpointing."""
        activations = self.activations_checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + activations + self.shared

    def describe(self, checkpointing: bool = False, optimizer: str = "AdamW") -> str:
        """Returns one line for people, in GiB, where the optimizer has its name."""
        activations = self.activations_checkpointed if checkpointing else self.activations
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            optimizer: self.optimizer,
            "activations": activations,
        } | ({"for the other devices": self.shared} if self.shared else {})
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"{self.total(checkpointing) / GIB:.2f} GiB ({listed})"


def kept_per_weight(optimizer: Optimizer) -> float:
    """Returns how many values an optimizer keeps of each weight, from a step on a small one: AdamW 2, plain SGD 0."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros(64, 64)
    options = optimizer.defaults | {"capturable": False}  # which is for a GPU, and the trial is not on one
    taken = signature(type(optimizer)).parameters
    make: Any = type(optimizer)
    trial = make([weight], **{name: value for name, value in options.items() if name in taken})
    trial.step()
    state = [value for value in trial.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() for value in state if value.dim()) / weight.numel()


def training_memory(
    model: PreTrainedModel,
    tokens: int,
    precision: str = "bf16-mixed",
    optimizer_values: float = 2.0,
    soft: bool = True,
    devices: int = 1,
    sharded: bool = False,
) -> TrainingMemory:
    """Estimates the memory of training on each device.

    With P weights of which Q are trainable, b_w and b_a bytes per weight and activation (``bf16-mixed``: 4 and 2,
    ``bf16-true``: 2 and 2), N tokens in a batch, L layers and V words in the vocabulary:

    - weights ``b_w P``, under autocast ``b_a`` more for each weight of a projection; gradients ``b_w Q``; AdamW
      ``2 b_w Q``
    - a layer keeps, per token, ``A`` numbers: the outputs of its projections outside the FFN, the attention's output
      (D), input and output of two norms (4 D), and in the FFN 2 F numbers, 4 F if it is gated (gate, its activation,
      up, their product), in soft mode F more for the scaled neurons and E scores
    - activations ``b_a N L A``; with gradient checkpointing ``b_a N (L D + A)``, the inputs of all layers and one layer
      that is being computed again
    - a language model's head adds ``N V (b_a + 8)``: the logits, their float32 copy and its gradient; less where only a
      part of the tokens has a label, for the others get no logits
    - DDP keeps the gradients once more, in the buckets that it sends
    - FSDP2 divides weights, gradients and AdamW's by the number of devices, but not the copies that autocast makes.
      What lies outside the layers stays gathered, and four of the largest layer: one that computes, one that is
      fetched, their gradients, and what is sent

    It assumes attention that does not keep its scores (``sdpa`` or flash attention) and an activation that is one
    operation; then it was within 15 % of what autograd kept of Llama and BERT. GPT-2's ``gelu_new`` is written out in
    seven, and kept up to 1.6 times the estimate. What the allocator wastes and what CUDA itself holds come on top.

    Args:
        model: A converted model, the parameters to train with ``requires_grad``.
        tokens: N, tokens in one device's batch, padding included; 0 if unknown.
        precision: Lightning's name of it.
        optimizer_values: How many values the optimizer keeps of each weight.
        soft: Whether the routers learn, so that soft mode's share of the activations is kept.
        devices: How many share the work.
        sharded: Whether they share the weights as well (FSDP2); else each has all of them (DDP).

    Raises:
        UserError: If the precision is unknown, or the number of tokens negative.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if tokens < 0:
        raise UserError(f"a batch cannot have {tokens} tokens")
    weight_bytes, activation_bytes = PRECISIONS[precision]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = devices if sharded else 1
    weights = weight_bytes * sum(parameter.numel() for parameter in model.parameters()) // parts
    if precision.endswith("mixed"):
        weights += activation_bytes * sum(m.weight.numel() for m in model.modules() if isinstance(m, Projection))
    layers = find_layers(model)
    per_token = [_kept_per_token(layer, soft) for layer in layers]
    inputs = len(layers) * model.config.get_text_config().hidden_size
    head = model.get_output_embeddings()
    logits = tokens * head.weight.shape[0] * (activation_bytes + 8) if isinstance(head, nn.Linear) else 0
    return TrainingMemory(
        weights=weights,
        gradients=weight_bytes * trainable // parts,
        optimizer=round(optimizer_values * weight_bytes * trainable) // parts,
        activations=activation_bytes * tokens * sum(per_token) + logits,
        activations_checkpointed=activation_bytes * tokens * (inputs + max(per_token)) + logits,
        shared=weight_bytes * (_gathered(model) if sharded else trainable * (devices > 1)),
    )


def _gathered(model: PreTrainedModel) -> int:
    """Weights that FSDP2 holds whole at its peak: those outside the layers, and four times the largest layer's."""
    in_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in find_layers(model)]
    return sum(parameter.numel() for parameter in model.parameters()) - sum(in_layers) + 4 * max(in_layers)


def _kept_per_token(layer: nn.Module, soft: bool) -> int:
    """Numbers that a layer keeps of each token for the backward pass."""
    ffns = list(expert_ffns(layer).values())
    inside = {id(module) for ffn in ffns for module in ffn.modules()}
    projections = [m for m in layer.modules() if isinstance(m, Projection) and id(m) not in inside]
    kept = sum(weight_rows(projection).shape[0] for projection in projections)
    for ffn in ffns:
        kept += 5 * ffn.width + ffn.neurons * (2 if ffn.gate is None else 4)
        kept += (ffn.neurons + ffn.experts) * soft
    return kept

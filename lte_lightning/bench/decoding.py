"""Timed passes of a whole model, and routers set to run a wanted share of the experts."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from lte_lightning.bench.machine import clock_on
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.decoding import fused_decoding
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.model.quantize import QUANTIZATIONS, quantize
from lte_lightning.errors import UserError

Arm = Callable[[], float]  # runs one pass and returns its tokens per second
WAYS = ("eager", "compiled", "fused", "captured")
Biases = dict[str, torch.Tensor]


def decoder(model: Any, prompt_BT: torch.Tensor, tokens: int, way: str = "eager") -> Arm:
    """Returns an arm that reads a prompt, untimed, and then decodes greedily.

    Args:
        model: A decoder with its head.
        prompt_BT: The prompts, all of one length.
        tokens: New tokens of each sequence.
        way: ``eager`` calls the model with a growing cache, ``compiled`` a compiled model with a static cache,
            ``captured`` a CUDA graph that advances its own position, ``fused`` the model within `fused_decoding`, with
            a static cache.
    """
    if way == "captured":
        return _captured(model, prompt_BT, tokens)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False) if way == "compiled" else model
    clock = clock_on(prompt_BT.device)

    def arm() -> float:
        with fused_decoding(model) if way == "fused" else nullcontext():
            return decode()

    def decode() -> float:
        options: dict[str, Any] = {"use_cache": True}
        if way != "eager":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + tokens + 1)
        outputs = model(prompt_BT, **options)
        cache, start = outputs.past_key_values, clock()
        for _ in range(tokens):
            next_BT = outputs.logits[:, -1:].argmax(dim=-1)
            outputs = step(next_BT, past_key_values=cache, use_cache=True)
        return prompt_BT.shape[0] * tokens / (clock() - start)

    return arm


class Stepper:
    """A greedy step of a decoder that updates cache, positions and tokens in place, so that a CUDA graph can replay it.

    Args:
        model: A decoder with its head.
        prompt_BT: The prompt.
        tokens: New tokens that the cache has room for.
    """

    def __init__(self, model: Any, prompt_BT: torch.Tensor, tokens: int) -> None:
        self.model, self.prompt_BT = model, prompt_BT
        self.cache: Any = StaticCache(config=model.config, max_cache_len=prompt_BT.shape[1] + tokens + 1)
        self.token_BT = prompt_BT[:, :1].clone()
        self.place_T = torch.zeros(1, dtype=torch.long, device=prompt_BT.device)
        self.places_L = torch.arange(prompt_BT.shape[1] + tokens + 1, device=prompt_BT.device)
        self.forward = model.forward

    def read(self) -> None:
        """Empties the cache and reads the prompt."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.reset()
        logits_BTV = self.model(self.prompt_BT, past_key_values=self.cache, use_cache=True).logits
        self.token_BT.copy_(logits_BTV[:, -1:].argmax(-1))
        self.place_T.fill_(self.prompt_BT.shape[1])

    def step(self) -> None:
        """Replaces each sequence's last token by the next."""
        dtype = self.model.dtype
        seen_L = torch.where(self.places_L <= self.place_T, 0.0, torch.finfo(dtype).min).to(dtype)
        outputs = self.forward(
            input_ids=self.token_BT,
            position_ids=self.place_T[None].expand(self.token_BT.shape),
            attention_mask=seen_L[None, None, None].expand(self.token_BT.shape[0], 1, 1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token_BT.copy_(outputs.logits[:, -1:].argmax(-1))
        self.place_T.add_(1)


def _captured(model: Any, prompt_BT: torch.Tensor, tokens: int) -> Arm:
    stepper = Stepper(model, prompt_BT, tokens)
    clock = clock_on(prompt_BT.device)
    graph: torch.cuda.CUDAGraph | None = None

    def capture() -> torch.cuda.CUDAGraph:
        stepper.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and warms up
            for _ in range(3):
                stepper.step()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            stepper.step()
        return recorded

    def arm() -> float:
        nonlocal graph
        stepper.read()
        if graph is None:
            graph = capture()
            stepper.read()
        start = clock()
        for _ in range(tokens):
            graph.replay()
        return prompt_BT.shape[0] * tokens / (clock() - start)

    return arm


def forward(model: Any, batch: Mapping[str, torch.Tensor], way: str = "eager") -> Arm:
    """Returns an arm that runs one forward pass over a batch; ``way`` is ``eager`` or ``compiled``."""
    call = torch.compile(model.forward, fullgraph=True, dynamic=False) if way == "compiled" else model
    clock = clock_on(batch["input_ids"].device)

    def arm() -> float:
        start = clock()
        call(**batch)
        return batch["input_ids"].numel() / (clock() - start)

    return arm


@torch.no_grad()
def even_routers(model: PreTrainedModel, sparsity: float, batch: Mapping[str, torch.Tensor]) -> Biases:
    """Sets the routers' biases so that each expert runs for the wanted share of a batch's tokens, and returns them.

    This is enough to measure speed; the quality means nothing.

    Args:
        model: A converted model in hard mode.
        sparsity: Share of the tokens that skip each expert.
        batch: Inputs of the model. Each layer sees the output of layers whose biases are already set.

    Raises:
        UserError: If a selector is not a linear router with a bias.
    """
    biases: Biases = {}

    def set_bias(name: str, ffn: Any, x_BTD: torch.Tensor) -> None:
        linear = ffn.selector.linear()
        if linear is None or linear[1] is None:
            raise UserError(
                f"--sparsity sets the biases of linear routers, and {name} has a {type(ffn.selector).__name__}; "
                "leave --sparsity out"
            )
        weight_ED, bias_E = linear
        logits_NE = torch.nn.functional.linear(x_BTD.flatten(0, -2), weight_ED).float()
        at = math.log(ffn.threshold / (1.0 - ffn.threshold))  # an expert runs above this logit
        bias_E.data.copy_(at - logits_NE.quantile(sparsity, dim=0) + (1e-3 if sparsity == 0 else 0.0))
        biases[name] = bias_E.data.clone()

    hooks = [
        ffn.register_forward_pre_hook(lambda module, inputs, name=name: set_bias(name, module, inputs[0]))
        for name, ffn in expert_ffns(model).items()
    ]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return biases


def set_biases(model: PreTrainedModel, biases: Biases) -> None:
    """Restores the biases that `even_routers` returned, in place, so that a captured graph sees them."""
    for name, ffn in expert_ffns(model).items():
        linear: Any = ffn.selector.linear()
        linear[1].data.copy_(biases[name])


def sparse_twin(plain: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Converts a plain model, in place, to hard mode with untrained routers and contiguous experts, and returns it.

    Args:
        plain: The plain model, in the wanted type.
        kind: ``int8`` or ``int4`` quantises it; any other value keeps its type.
    """
    model = convert(plain, LteConfig(grouping="contiguous", router_margin=0.0), progress=False)
    set_mode(model, "hard")
    for ffn in expert_ffns(model).values():
        ffn.selector.to(plain.dtype)
    set_backend(model, "auto")
    for known in QUANTIZATIONS:
        if kind == known:
            quantize(model, known)
    return model

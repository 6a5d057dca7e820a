"""Measures two LLaMA-2-7B-shaped decoders with random weights: the plain Hugging Face model, and one with routers.

Each runs with a static cache and one CUDA graph per token, and eagerly. The script sets the routers' biases to
quantiles of their own logits. So the real router runs and selects the wanted share of experts.
"""

import statistics
from typing import Any

import torch
from timing import capture, elapsed_ms
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU serves only to rehearse
SPARSITIES = (0.5, 0.8, 0.9)
CONTEXT, NEW = 128, 64


def make(layers: int = 32, width: int = 4096, neurons: int = 11008, heads: int = 32) -> LlamaForCausalLM:
    """Makes a LLaMA with random bfloat16 weights, by default in LLaMA-2-7B's shape."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32000, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=DEVICE).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 2:
            tensor.data.normal_(std=0.02)
        elif "norm" in name:
            tensor.data.fill_(1.0)
    rotary = type(model.model.rotary_emb)(config=config).to(DEVICE)
    model.model.rotary_emb = rotary  # `to_empty` has lost the computed frequencies
    return model


class Stepper:
    """Decodes one token with a static cache, captured as a graph that advances its own position."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.token_BT = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
        self.place_T = torch.full((1,), CONTEXT // 2, device=DEVICE)
        self.places_L = torch.arange(CONTEXT, device=DEVICE)

    @torch.no_grad()
    def step(self) -> None:
        seen_L = torch.where(self.places_L <= self.place_T, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
        out = self.model(
            input_ids=self.token_BT, position_ids=self.place_T[None], attention_mask=seen_L[None, None, None],
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.token_BT.copy_(out.logits[:, -1:].argmax(-1))

    def reset(self) -> None:
        """Resets the cache to the middle of the context, where the script times every step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(CONTEXT // 2)


@torch.no_grad()
def set_sparsity(model: LlamaForCausalLM, sparsity: float) -> float:
    """Sets each router's bias for the wanted share of experts on random tokens; returns the sparsity."""
    hooks = []

    def calibrate(ffn: Any, args: tuple[torch.Tensor, ...]) -> None:
        logits = torch.nn.functional.linear(args[0], ffn.selector.weight).float()
        ffn.selector.bias.data.fill_(-logits.quantile(sparsity).item())

    ffns = expert_ffns(model).values()
    for ffn in ffns:
        hooks.append(ffn.register_forward_pre_hook(calibrate))
    ids_BT = torch.randint(0, 32000, (1, 64), device=DEVICE)
    model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    with lte_lightning.RouterTrace(model, torch.ones_like(ids_BT)) as trace:
        model(input_ids=ids_BT)
    return trace.sparsity()


def make_sparse(**shape: int) -> LlamaForCausalLM:
    """Makes the same decoder with experts and routers and its own weights, in hard mode."""
    model = make(**shape)
    lte_lightning.convert(model, lte_lightning.LteConfig(grouping="contiguous"), progress=False)
    model.to(torch.bfloat16)
    lte_lightning.set_mode(model, "hard")
    lte_lightning.set_backend(model)
    return model


def rehearse() -> None:
    """Runs a tiny decoder's steps on this machine, to check the script without a GPU."""
    model = make_sparse(layers=2, width=64, neurons=128, heads=4)
    print(f"rehearsed: wanted sparsity 50 %, reached {set_sparsity(model, 0.5):.0%}")
    stepper = Stepper(model)
    for _ in range(3):
        stepper.step()
        stepper.reset()


def measure() -> list[dict[str, Any]]:
    """Returns rows with milliseconds of dense and sparse steps, interleaved: kernel by kernel, compiled, and eager."""
    rows = []
    dense, sparse = Stepper(make()), Stepper(make_sparse())
    weights = sum(p.numel() for p in dense.model.parameters())
    for way in ("eager", "graph", "compiled, graph"):
        steps = [dense.step, sparse.step]
        set_sparsity(sparse.model, SPARSITIES[0])
        if way.startswith("compiled"):
            steps = [torch.compile(step, fullgraph=True, dynamic=False) for step in steps]
        if way.endswith("graph"):
            graphs = [capture(step) for step in steps]
            steps = [graph.replay for graph in graphs]
        for sparsity in SPARSITIES:
            reached = set_sparsity(sparse.model, sparsity)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(NEW):
                for stepper, step, measured in zip((dense, sparse), steps, times, strict=True):
                    stepper.reset()
                    torch.cuda.synchronize()
                    measured.append(elapsed_ms(step))
            dense_ms, ms = map(statistics.median, times)
            rows.append({
                "model": f"LLaMA-2-7B-shaped, {weights / 1e9:.2f} B", "way": way, "sparsity": sparsity,
                "reached": reached, "dense_ms": dense_ms, "ms": ms, "tokens_s": 1e3 / ms, "ratio": dense_ms / ms,
            })  # fmt: skip
            print(rows[-1], flush=True)  # in case a later one is cut short
    return rows

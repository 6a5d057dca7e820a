"""The computation of ``lte cost``, and its tables."""

from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from lte_lightning.cli.cost_devices import fit_costs
from lte_lightning.core.accounting.cost import GFLOP, TokenCost, check_context, speedup_bound, token_cost
from lte_lightning.core.accounting.fit import Machines
from lte_lightning.core.accounting.memory import GIB, training_memory
from lte_lightning.core.accounting.skeleton import skeleton
from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import require_expert_ffns
from lte_lightning.core.model.folder import CONFIG_FILE, is_lte, read_description
from lte_lightning.data.packaged import resolve
from lte_lightning.errors import UserError

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def work_out(
    source: str,
    sparsity: float | None,
    dtype: str,
    context: int | None,
    expert_size: int | None,
    batch_size: int,
    precision: str,
    machines: Machines | None = None,
    texts: int | None = None,
) -> dict[str, Any]:
    """Returns the costs of a model as ``lte cost --json`` prints them; the arguments are the command's options.

    With ``machines``, the result has the cost of a fit on them. Without a known sparsity it then omits that of a token.

    Raises:
        UserError: If one of them is wrong.
    """
    hf_logging.set_verbosity_error()
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    folder = resolve(source)
    model = skeleton(folder, expert_size)
    context = check_context(model, context)
    layers = len(require_expert_ffns(model))
    costs: dict[str, Any] = {"model": source, "expert_size": lte_config(model).expert_size, "context": context}
    if machines is not None:
        costs["fit"] = fit_costs(model, batch_size, context, precision, machines, texts)
        if sparsity is None and not has_measured(folder):
            return costs
    per_layer = measured_sparsity(folder, model) if sparsity is None else [sparsity] * layers
    dense = token_cost(model, None, DTYPES[dtype], context)
    sparse = token_cost(model, per_layer, DTYPES[dtype], context)
    memory = training_memory(model, batch_size * context, precision)
    return {
        **costs,
        "sparsity_per_layer": per_layer,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        **figures(model, dense, sparse, per_layer),
        "training_memory": {
            "precision": precision,
            "tokens": batch_size * context,
            **asdict(memory),
            "total": memory.total(),
            "total_checkpointed": memory.total(checkpointing=True),
        },
    }


def figures(
    model: PreTrainedModel, dense: TokenCost, sparse: TokenCost, sparsity_per_layer: list[float]
) -> dict[str, Any]:
    """Returns the costs of a dense and of a sparse token side by side, as ``--json`` prints them."""
    ffns = list(require_expert_ffns(model).values())
    neurons = [ffn.neurons for ffn in ffns]
    running = sum(n * (1.0 - s) for n, s in zip(neurons, sparsity_per_layer, strict=True))
    router = sum(ffn.selector.flops_per_token() for ffn in ffns) / sum(ffn.flops_dense() for ffn in ffns)
    bounds = {
        "bound": speedup_bound(dense.bytes, sparse.bytes),
        "ffn_bound": speedup_bound(dense.ffn_bytes, sparse.ffn_bytes),
    }
    return {
        "sparsity": 1.0 - running / sum(neurons),
        "paper_gflops_per_token": {"dense": dense.paper_flops / GFLOP, "sparse": sparse.paper_flops / GFLOP},
        "flops_per_token": {"dense": dense.flops, "sparse": sparse.flops},
        "parameters_per_token": {"dense": dense.parameters, "sparse": sparse.parameters},
        "bytes_per_token": {"dense": dense.bytes, "sparse": sparse.bytes},
        # an FFN that runs and reads nothing has no bound, and JSON has no infinity
        **{key: {"dense": 1.0, "sparse": value if value < float("inf") else None} for key, value in bounds.items()},
        "router_share_of_ffn_flops": router,
    }


def _hardest(source: str) -> dict[str, Any]:
    measured = read_description(source)["about"].get("measured", {}) if is_lte(source) else {}
    return measured.get("hard") or measured.get("hard_before") or {}


def has_measured(source: str) -> bool:
    """Says whether a saved model holds the sparsity of each layer from its last measurement."""
    return "sparsity_per_layer" in _hardest(source)


def measured_sparsity(source: str, model: PreTrainedModel) -> list[float]:
    """Returns the sparsity of each layer from the last measurement of a saved LTE model."""
    hardest = _hardest(source)
    if "sparsity_per_layer" not in hardest:
        why = f"{CONFIG_FILE} of {source} has no measured sparsity" if is_lte(source) else f"{source} is a plain model"
        raise UserError(f"{why}; give --sparsity, a share from 0 to 1")
    return list(hardest["sparsity_per_layer"])


def cost_table(costs: dict[str, Any]) -> Table:
    """Returns the costs of a dense and of a sparse token side by side."""
    title = f"cost per token: {costs['dtype']}, context {costs['context']}, experts of {costs['expert_size']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "dense", f"{100 * costs['sparsity']:.1f} % sparse", "quotient"):
        table.add_column(column, justify="right" if column else "left")
    rows = [
        ("GFLOPs as the paper counts (2^30)", "paper_gflops_per_token", 1, "{:.4f}"),
        ("GFLOPs with scores and head (10^9)", "flops_per_token", 1e9, "{:.4f}"),
        ("weights read (10^6)", "parameters_per_token", 1e6, "{:.3f}"),
        ("MB moved (10^6), KV cache included", "bytes_per_token", 1e6, "{:.3f}"),
    ]
    for label, key, unit, form in rows:
        dense, sparse = costs[key]["dense"], costs[key]["sparse"]
        quotient = f"{dense / sparse:.2f}x" if sparse else "∞"
        table.add_row(label, form.format(dense / unit), form.format(sparse / unit), quotient)
    table.add_section()
    for label, key in (("speed-up bound, end to end", "bound"), ("speed-up bound, FFN blocks alone", "ffn_bound")):
        bound = costs[key]["sparse"]
        table.add_row(label, "1.00x", "", "∞" if bound is None else f"{bound:.2f}x")
    share = 100 * costs["router_share_of_ffn_flops"]
    table.caption = f"Bounds: bytes moved at batch 1. Routers, included: {share:.2f} % of the dense FFNs."
    table.caption_justify = "left"
    return table


def memory_table(costs: dict[str, Any]) -> Table:
    """Returns the memory that training needs, with and without gradient checkpointing."""
    title = f"training memory, {costs['tokens']} tokens per device, {costs['precision']}"
    table = Table(title=title, title_justify="left", min_width=60)
    for column in ("GiB", "plain", "gradient checkpointing"):
        table.add_column(column, justify="left" if column == "GiB" else "right")
    for name in ("weights", "gradients", "optimizer"):  # AdamW's
        table.add_row(name, *[f"{costs[name] / GIB:.2f}"] * 2)
    for name in ("activations", "total"):
        table.add_row(name, f"{costs[name] / GIB:.2f}", f"{costs[f'{name}_checkpointed'] / GIB:.2f}")
    return table

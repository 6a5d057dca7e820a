"""Turn FFNs into expert FFNs and back."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.bars import Bar
from lte_lightning.core.model.attention import use_attention
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.exact import computes_on, is_part, why_not_linear
from lte_lightning.core.model.experts import ExpertFfn, expert_ffns, require_expert_ffns
from lte_lightning.core.model.families import find_row
from lte_lightning.core.model.grouping import Grouping, expert_count, group_neurons
from lte_lightning.core.model.instance import adopt, release
from lte_lightning.core.model.parts import (
    FfnParts,
    Projection,
    find_layers,
    find_parts,
    find_stacks,
    get_child,
    weight_rows,
)
from lte_lightning.core.model.quantized import is_quantized
from lte_lightning.core.model.residual import use_sum_norms
from lte_lightning.core.model.sharding import whole
from lte_lightning.core.model.storage import activation_name, lay_out
from lte_lightning.core.model.swap import insert, lte_config, remove, set_lte_config
from lte_lightning.errors import UserError
from lte_lightning.selection import FfnShape, ModelShape, Selector, selector_class


def convert(
    model: PreTrainedModel, config: LteConfig | None = None, progress: bool = True, group: bool = True
) -> PreTrainedModel:
    """Turns every FFN of ``model`` into experts, in place; the function it computes stays the same.

    It checks everything before it changes anything. The model starts in mode ``dense``.

    Args:
        model: A plain Hugging Face model of a family in the FFN table.
        config: How to group and select; by default the paper's choices.
        progress: Show a progress bar while grouping.
        group: Group the neurons now; otherwise they keep their order until `group_experts`.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If the family, or the type of a projection, is unknown.
        UserError: If the expert size does not divide the FFN width, too few experts are left for the sparsity asked
            for, a module that it replaces has hooks, or the model has been converted before.
    """
    config = config or LteConfig()
    if expert_ffns(model):
        raise UserError(f"this {type(model).__name__} has expert FFNs already; restore() it first")
    if config.budget is not None:
        raise UserError(
            f"target_{config.budget[0]} is not a sparsity yet; give convert() what core.accounting.budget.meet_budget("
            "model, config) returns"
        )
    sites = [(layer, stack) for stack, layers in enumerate(find_stacks(model)) for layer in layers]
    row = find_row(model.config.model_type)
    all_parts = [find_parts(layer, row) for layer, _ in sites]
    for (layer, _), parts in zip(sites, all_parts, strict=True):
        _check_hooks(layer, parts)
    for parts in all_parts:
        expert_count(weight_rows(parts.up).shape[0], config.expert_size)
    selector_class(config.selector).check_model(config, _model_shape(model, all_parts))
    if isinstance(config.sparsity_per_layer, list) and len(config.sparsity_per_layer) != len(sites):
        raise UserError(
            f"sparsity_per_layer gives {len(config.sparsity_per_layer)} layers, and this {type(model).__name__} has "
            f"{len(sites)}"
        )
    if group and groups_by_activation(config):
        _require_activations(None)

    generator = torch.Generator().manual_seed(config.seed or 0)
    selectors = [_make_selector(config, parts, generator) for parts in all_parts]
    for selector in selectors:
        selector.check_sparsity(config)
    for (layer, stack), parts, selector in zip(sites, all_parts, selectors, strict=True):
        threshold = 0.0 if selector.scales else config.threshold
        ffn = ExpertFfn(parts, config.expert_size, selector.to(computes_on(parts.up)), threshold)
        ffn.stack = stack
        if parts.row.module:
            ffn.shell = (get_child(layer, parts.row.module),)  # in a tuple, which does not register its weights twice
        insert(layer, ffn)
    set_lte_config(model, config)
    adopt(model)
    if not group:
        return model
    try:
        group_experts(model, progress)
    except BaseException:  # nonfinite weights, or Ctrl-C during clustering
        restore(model)
        raise
    return model


def _check_hooks(layer: nn.Module, parts: FfnParts) -> None:
    """Refuses hooks on modules that the expert FFN replaces. Its own parts keep their hooks."""
    row = parts.row
    for path in filter(None, (row.module, row.up if row.fused else None)):
        module = get_child(layer, path)
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(
                f"{type(layer).__name__}.{path} has forward hooks, which would be lost: an expert FFN takes its place. "
                "Remove them, and register them on the converted model"
            )
        if row.fused and path == row.up and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise UserError(
                f"the weights of {type(layer).__name__}.{path} are offloaded (device_map), and experts take parts of "
                "them; load the model without offload_folder, or keep these modules in memory by device_map"
            )


def groups_by_activation(config: LteConfig) -> bool:
    """Says whether `group_experts` needs the neurons' activations."""
    return config.grouping in ("coactivation", "use") and config.expert_size > 1


def group_experts(
    model: PreTrainedModel,
    progress: bool = True,
    activations: Sequence[torch.Tensor] | None = None,
    once: Callable[[Callable[[], Grouping]], Grouping] = lambda work: work(),
) -> list[Grouping]:
    """Groups the neurons of a converted model by its configuration's method, in place, without changing its function.

    Args:
        model: A converted model.
        progress: Show a progress bar.
        activations: For grouping ``coactivation``, the activations [F, N] of each FFN's neurons on training rows (see
            `core.routing.observe.neuron_activations`).
        once: Calls a function in one of several processes, and returns its result in all of them.

    Returns:
        The grouping of each layer, with what clustering gained over chance.

    Raises:
        UserError: If the method needs activations and there are none, a neuron's weights or activations are not
            finite, or a projection is not its weight and bias alone (an adapter, a parametrization).
    """
    config = lte_config(model)
    ffns = expert_ffns(model)
    keeps_order = config.expert_size == 1 or selector_class(config.selector).keeps_order
    if config.grouping == "contiguous" or keeps_order:  # experts of one neuron need no order
        return []
    for name, ffn in ffns.items():
        for projection in filter(None, (ffn.up, ffn.gate, ffn.down)):
            if (why := why_not_linear(projection)) and not is_part(projection.weight):
                raise UserError(f"neurons of {name} cannot be reordered: a projection {why}; group them before that")
    uses: list[torch.Tensor | None] = [None] * len(ffns)
    if groups_by_activation(config):
        rows = _require_activations(activations)
        uses = [
            magnitudes_FN.float().mean(1) * whole(weight_rows(ffn.down)).detach().float().norm(dim=0).cpu()
            for ffn, magnitudes_FN in zip(ffns.values(), rows, strict=True)
        ]
    else:
        rows = [weight_rows(ffn.up if ffn.gate is None else ffn.gate) for ffn in ffns.values()]
    groupings = []
    for i, rows_FX in enumerate(Bar(rows, desc=f"grouping ({config.grouping})", disable=not progress)):
        seed = (config.seed or 0) + i
        arguments = whole(rows_FX), config.expert_size, config.grouping, seed, uses[i]
        with torch.device("cpu"):  # as for selectors
            groupings.append(once(partial(group_neurons, *arguments)))
    for ffn, grouping in zip(ffns.values(), groupings, strict=True):
        ffn.permute(grouping.permutation_F.to(ffn.up.weight.device))
    return groupings


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the plain Hugging Face model in place. Its FFNs run densely, and keep the order of the experts.

    Raises:
        UserError: If the model has no expert FFNs, or they are quantised, or they are fused and sharded over devices.
    """
    if is_quantized(model):
        raise UserError(
            "a quantised model cannot be made plain again: load the model that it was made from. To run every expert, "
            "set_mode(model, 'dense')"
        )
    ffns = require_expert_ffns(model).values()
    if any(ffn.row.fused and is_part(ffn.up.weight) for ffn in ffns):
        raise UserError(
            f"fused projections of this {type(model).__name__} are sharded over devices, and cannot be put together; "
            "gather its weights, save them with save_pretrained, and load the folder with transformers"
        )
    for ffn in ffns:
        lay_out(ffn.parts, by_neuron=False)
    use_attention(model, kernel=False)
    use_sum_norms(model, kernel=False)
    for layer in find_layers(model):
        remove(layer)
    del model.lte_config
    for name in ("lte_base", "lte_thresholds"):
        model.__dict__.pop(name, None)
    release(model)
    return model


def selector_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of all selectors."""
    for ffn in expert_ffns(model).values():
        yield from ffn.selector.parameters()


def _model_shape(model: PreTrainedModel, all_parts: Sequence[FfnParts]) -> ModelShape:
    projections = [p for parts in all_parts for p in (parts.gate, parts.up, parts.down) if p is not None]
    inside = [m for layer in find_layers(model) for m in layer.modules() if isinstance(m, Projection)]
    ffn_inputs, layer_inputs = (tuple(weight_rows(p).shape[1] for p in each) for each in (projections, inside))
    stacks = len(find_stacks(model))
    return ModelShape(type(model).__name__, model.config.model_type, stacks, ffn_inputs, layer_inputs)


def _require_activations(activations: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    if activations is None:
        raise UserError(
            "grouping 'coactivation' or 'use' needs what the neurons do on training rows: convert(..., group=False), "
            "and then group_experts(model, activations=neuron_activations(model, batches, tokens))"
        )
    return activations


def _make_selector(config: LteConfig, parts: FfnParts, generator: torch.Generator) -> Selector:
    neurons, width = weight_rows(parts.up).shape
    activation = activation_name(parts.activation)
    shape = FfnShape(width, neurons // config.expert_size, parts.gate is not None, activation)
    # Not on torch's default device, which Lightning sets to a GPU, because the generator is the CPU's.
    with torch.device("meta" if computes_on(parts.up).type == "meta" else "cpu"):
        return selector_class(config.selector).make(shape, config, generator)

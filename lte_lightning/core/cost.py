"""FLOPs per token, as the paper counts them."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lte_lightning.core.convert import require_expert_ffns
from lte_lightning.core.errors import UserError
from lte_lightning.core.expert_ffn import ExpertFfn
from lte_lightning.core.ffn import Projection, find_layers


def flops_per_token(model: PreTrainedModel, sparsity_per_layer: Sequence[float] | None = None) -> int:
    """Counts FLOPs per token as in Table 1 of the paper: 2 per multiply-add of the layers' weights.

    Attention projections and FFNs count; embeddings, attention scores and the head do not. The paper's GFLOPs are these
    divided by 2^30.

    Args:
        model: A converted model (its weights may be on the meta device).
        sparsity_per_layer: Share of the neurons that do not run, per layer. The routers' work is then added. None: the
            dense model.

    Raises:
        UserError: If the model was not converted, or the number of layers differs.
    """
    ffns = list(require_expert_ffns(model).values())
    inside = {id(module) for ffn in ffns for module in ffn.modules()}
    total = 0
    for layer in find_layers(model):
        outside = [module for module in layer.modules() if id(module) not in inside]
        total += sum(2 * module.weight.numel() for module in outside if isinstance(module, Projection))
    if sparsity_per_layer is None:
        return total + sum(ffn.flops_dense() for ffn in ffns)
    if len(sparsity_per_layer) != len(ffns):
        raise UserError(f"{len(sparsity_per_layer)} sparsities for {len(ffns)} layers")
    for ffn, sparsity in zip(ffns, sparsity_per_layer, strict=True):
        total += round(ffn.flops_dense() * (1.0 - sparsity)) + selector_flops(ffn)
    return total


def selector_flops(ffn: ExpertFfn) -> int:
    """FLOPs per token of the selection itself."""
    return 2 * sum(p.numel() for p in ffn.selector.parameters() if p.dim() == 2)

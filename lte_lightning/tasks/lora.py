"""LoRA on attention, with the FFNs trained in full: less memory for models of billions of weights."""

from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.convert import lte_config
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import Projection, find_layers
from lte_lightning.errors import UserError


@dataclass
class Lora:
    """Low-rank adapters on every projection of the layers outside their FFNs, which are frozen.

    FFNs, routers, embeddings and norms are trained in full: sparsity changes the FFNs.

    Args:
        rank: Of the adapters.
        alpha: Their output is scaled by alpha / rank.
        dropout: On their input.

    Raises:
        UserError: If the rank is not positive, or peft is not installed.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if find_spec("peft") is None:
            raise UserError('LoRA needs peft: pip install "lte-lightning[peft]"')


def add_lora(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Puts adapters on a converted model's attention, in place; the function it computes stays the same.

    Returns:
        The names of the projections that have one.

    Raises:
        UserError: If the projections are to be pruned.
    """
    if lte_config(model).wanda_scope == "layers":
        raise UserError(
            "wanda_scope layers prunes the projections that lora freezes, and merged adapters would fill the zeros; "
            "leave lora out, or set wanda_scope to ffn"
        )
    from peft import LoraConfig, inject_adapter_in_model  # slow, and for few

    inside = {id(module) for ffn in expert_ffns(model).values() for module in ffn.modules()}
    within = {id(module) for layer in find_layers(model) for module in layer.modules()} - inside
    targets = {
        name: module
        for name, module in model.named_modules()
        if id(module) in within and isinstance(module, Projection)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank: it need not be whole
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for module in targets.values()),  # Conv1D
    )
    inject_adapter_in_model(config, model)
    # peft freezes all but its adapters
    for parameter in trained:
        parameter.requires_grad_(True)
    for module in targets.values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return list(targets)


def merge_lora(model: PreTrainedModel) -> None:
    """Merges adapters into the weights below them, in place, and removes the adapters."""
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_base_layer")]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        base = module.get_base_layer()
        base.requires_grad_(True)
        setattr(model.get_submodule(parent), child, base)

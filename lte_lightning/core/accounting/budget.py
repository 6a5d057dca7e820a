"""A target in FLOPs or bytes per token, as the sparsity that costs as much."""

from transformers import PreTrainedModel

from lte_lightning.core.accounting.cost import cost_beside_dense
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, restore
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class


def meet_budget(model: PreTrainedModel, config: LteConfig) -> LteConfig:
    """Returns a configuration whose ``target_sparsity`` meets its budget; one without a budget is returned as it is.

    Both budgets fall evenly with the sparsity, so that two costs, with all experts and with none, tell every other.

    Args:
        model: A plain or a converted model; it is afterwards what it was.
        config: Experts and routers.

    Raises:
        UserError: If no sparsity meets the budget, or the selector's costs are not known before it has pruned.
    """
    if config.budget is None:
        return config
    name, share = config.budget
    if selector_class(config.selector).calibration == "pruning":
        raise UserError(
            f"what selector {config.selector!r} costs is known once it has pruned; give target_sparsity in place of "
            f"target_{name}"
        )
    plain = not expert_ffns(model)
    if plain:
        convert(model, config.with_target(0.5), progress=False, group=False)
    try:
        layers = len(expert_ffns(model))
        most, least = (cost_beside_dense(model, [sparsity] * layers) for sparsity in (0.0, 1.0))
    finally:
        if plain:
            restore(model)
    dense = most[f"dense_{name}_per_token"]
    high, low = most[f"{name}_per_token"] / dense, least[f"{name}_per_token"] / dense
    if share <= low:
        raise UserError(
            f"target_{name} is {share}, out of reach: with no expert at all, but selector {config.selector!r}, this "
            f"model takes {low:.3f} of the dense model's {name} per token; give more than that"
        )
    return config.with_target((high - share) / (high - low))

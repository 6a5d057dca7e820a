"""The configuration of a converted model. The task configures its training."""

from dataclasses import dataclass, replace
from typing import Literal

from lte_lightning.errors import UserError
from lte_lightning.selection import selector_class


@dataclass
class LteConfig:
    """How FFNs are cut into experts and how experts are selected.

    Args:
        expert_size: Neurons per expert; must divide the FFN width (paper: 32).
        grouping: How neurons are assigned to experts: balanced k-means on their L2-normalised input weights (the
            paper) or on what they do together on training rows (``coactivation``), a random partition, or the order
            they already have. ``use`` gives the first tenth of the experts the neurons that do most on training rows,
            the most used first, and groups the others by ``coactivation``.
        selector: ``router`` is LTE's; ``none`` never runs an expert, the floor that every method is read against. The
            baselines are ``cats``, ``d2dmoe``, ``dejavu``, ``kla``, ``moefication``, ``narrow``, ``random``,
            ``sigmamoe``, ``softmax``, ``teal`` and ``wanda`` (see docs/baselines.md). Others are those that
            `register_selector` was told of; on the command line a class path, ``my_module.MySelector``, is one.
        target_sparsity: Share of the experts that shall not run; for ``teal`` and ``wanda`` share of the
            weights that shall not be used. For LTE's own router, in place of ``efficiency_weight``: it is held while
            the routers and the model train. Without it, LTE's sparsity follows from ``efficiency_weight``.
        target_flops: In place of ``target_sparsity``: the share, 0 to 1, of the dense model's FLOPs per token that the
            sparse model shall take, attention, routers and predictors included. A fit that loads its model turns it
            into the sparsity that costs as much (`core.accounting.budget`).
        target_bytes: The same with the bytes that a token moves at batch 1.
        sparsity_per_layer: How layers share LTE's ``target_sparsity``: ``equal`` gives it to each; ``free`` holds it
            over all layers together, which may then differ; a list gives every layer its own, whose mean is the target.
        threshold: An expert runs when its score exceeds this (tau in the paper).
        router_bias: Give each router a bias, so that scores can start above the threshold (see ``router_margin``).
            ``false`` is the paper's bias-free equation 1, whose scores start around 0.5.
        router_margin: Logits by which the initial scores lie above the threshold, on average; needs the bias.
        router_scale: Spread of the initial logits for inputs of unit root mean square (weights are drawn with standard
            deviation ``router_scale / sqrt(D)``).
        wanda_pattern: Where ``wanda`` prunes a row of a weight: ``unstructured``, or ``2:4`` or ``4:8``, half of each 4
            or 8 neighbours (``target_sparsity`` 0.5). YAML wants quotes: ``"2:4"`` without is the number 124.
        wanda_scope: What ``wanda`` prunes: ``ffn``, the FFNs alone as every other method, or ``layers``, attention's
            projections too (the paper's Table 2; not of encoder-decoders).
        seed: Seed of the grouping and of the routers' initial weights; by default that of the run, or 0 outside of one.
    """

    expert_size: int = 32
    grouping: Literal["kmeans", "coactivation", "use", "random", "contiguous"] = "kmeans"
    selector: str = "router"
    target_sparsity: float | None = None
    target_flops: float | None = None
    target_bytes: float | None = None
    sparsity_per_layer: Literal["equal", "free"] | list[float] = "equal"
    threshold: float = 0.5
    router_bias: bool = True
    router_margin: float = 2.0
    router_scale: float = 0.4
    wanda_pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    wanda_scope: Literal["ffn", "layers"] = "ffn"
    seed: int | None = None

    def __post_init__(self) -> None:
        if type(self.expert_size) is not int or self.expert_size < 1:  # files may hold anything
            raise UserError(f"expert_size is {self.expert_size!r}; it must be a whole number from 1 on (the paper: 32)")
        for name in ("threshold", "router_margin", "router_scale", *(f"target_{name}" for name, _ in self._targets())):
            value = getattr(self, name)
            is_left_out = value is None and name.startswith("target_")
            if isinstance(value, bool) or not (is_left_out or isinstance(value, int | float)):
                raise UserError(f"{name} is {value!r}; it must be a number")
        if not isinstance(self.router_bias, bool):
            raise UserError(f"router_bias is {self.router_bias!r}; it must be true or false")
        if not 0.0 < self.threshold < 1.0:
            raise UserError(f"threshold is {self.threshold}; it must lie in (0, 1), as scores do (the paper uses 0.5)")
        if selector_class(self.selector).no_target:  # the floor of a configuration that sets one
            self.target_sparsity = self.target_flops = self.target_bytes = None
        self._check_budget()
        # A budget becomes a target once the model is loaded. Until then any target stands for it.
        selector_class(self.selector).check(self if self.budget is None else self.with_target(0.5))
        self._check_layers()
        if not self.router_scale > 0.0:
            raise UserError(
                f"router_scale is {self.router_scale}; it must be positive, or all scores start equal and stay so"
            )

    @property
    def budget(self) -> tuple[str, float] | None:
        """``flops`` or ``bytes``, and their share of the dense model's; None if the target is a sparsity or not set."""
        return next(((name, share) for name, share in self._targets()[1:] if share is not None), None)

    @property
    def has_target(self) -> bool:
        """Whether a target sparsity or a budget is set."""
        return any(share is not None for _, share in self._targets())

    def with_target(self, sparsity: float) -> "LteConfig":
        """Returns the configuration with this target sparsity in place of its budget."""
        return replace(self, target_sparsity=sparsity, target_flops=None, target_bytes=None)

    def _targets(self) -> list[tuple[str, float | None]]:
        return [("sparsity", self.target_sparsity), ("flops", self.target_flops), ("bytes", self.target_bytes)]

    def _check_budget(self) -> None:
        targets = [f"target_{name} {share}" for name, share in self._targets() if share is not None]
        if len(targets) > 1:
            raise UserError(f"{' and '.join(targets)} each set the sparsity; set one of them")
        if self.budget is None:
            return
        name, share = self.budget
        if not 0.0 < share < 1.0:
            raise UserError(f"target_{name} is {share}; it is a share of the dense model's {name}, above 0 and below 1")
        if isinstance(self.sparsity_per_layer, list):
            raise UserError(
                f"sparsity_per_layer gives every layer's sparsity, so target_{name} {share} has nothing to decide; "
                "leave one out"
            )

    def _check_layers(self) -> None:
        layers, target = self.sparsity_per_layer, self.target_sparsity
        if layers == "equal":
            return
        if not self.has_target or not selector_class(self.selector).optional_target:
            raise UserError(
                f"sparsity_per_layer is {layers}, and there is no target_sparsity that LTE's routers are held at; set "
                "target_sparsity, or leave it out"
            )
        if isinstance(layers, str):
            if layers != "free":
                raise UserError(f"sparsity_per_layer is {layers!r}; it is equal, free, or a list of shares")
        elif not layers or not all(0.0 <= share < 1.0 for share in layers):
            raise UserError(f"sparsity_per_layer is {layers}; each must be at least 0 and below 1")
        elif target is not None and abs((mean := sum(layers) / len(layers)) - target) > 0.001:
            raise UserError(
                f"sparsity_per_layer has the mean {mean:.4g}, and target_sparsity is {target}; set that to {mean:.4g}"
            )

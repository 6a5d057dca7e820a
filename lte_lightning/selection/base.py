"""The protocol of a selector: its attributes and its methods.

Class attributes describe a selector. Methods that most selectors do not need have defaults. The rest of the package
reads these attributes and methods, and never asks for the class of a selector. `register_selector` gives a
selector its name. Shapes: B batch, T tokens, N real tokens of a batch, D width of the model, F neurons, E experts, and
I inputs, O outputs of one projection.
"""

from typing import ClassVar, Literal

import torch
from torch import nn

from lte_lightning.errors import UserError
from lte_lightning.selection.facts import Activity, Description, Ffn, FfnShape, ModelShape, Options

Reads = Literal["input", "gate", "hidden"]
Learns = Literal["never", "imitation", "efficiency", "balance"]
Calibration = Literal["none", "dense", "sequential", "common", "pruning", "control"]
Scope = Literal["none", "ffn", "layers"]

# Methods that a selector with this attribute must define
_PROMISED = {
    ("learns", "imitation"): ("imitation_loss",),
    ("learns", "balance"): ("balance_loss",),
    ("calibration", "dense"): ("sample", "calibrate"),
    ("calibration", "sequential"): ("sample", "calibrate"),
    ("calibration", "common"): ("set_common_level",),
    ("calibration", "pruning"): ("prune_scope", "least_important", "weights_left", "set_density"),
}


class Selector(nn.Module):
    """Maps what it reads to ``scores_BTE`` in [0, 1], float32; in hard mode an expert runs if its score exceeds tau.

    Attributes:
        label: Name for people, in tables and legends; the class's name if empty.
        caveat: Caveat shown beside the label.
        oracle: Whether it reads the activations that it saves, and is charged nothing for them.
        reads: What `forward` is given: the FFN's ``input`` x_BTD; its ``gate`` activations, activation(gate(x)), or of
            a plain FFN activation(up(x)), [B, T, F]; or its ``hidden`` activations, the down projection's input.
        scales: Whether hard mode, too, multiplies an expert's output by its score; experts that do not run score 0.
        graded: Whether scores are more than a yes or no.
        needs_expert_size: The only expert size that it works with; None for any.
        no_target: The reason why a ``target_sparsity`` means nothing to it; empty if it takes one.
        optional_target: Whether it also works without a ``target_sparsity``.
        sparsity_of: What its sparsity is a share of: ``experts``, or ``weights``.
        keeps_order: Whether neurons must keep the order that they have in the model, so that they are not grouped.
        learns: How the router stage trains it: ``never``; by ``imitation`` of the dense model, alone (see
            `imitation_loss`); or with the task, by equations 4 and 5 of the paper on its scores (``efficiency``), or by
            a `balance_loss` of its own (``balance``).
        balance_weight: Weight of the balance loss.
        calibration: How it is calibrated on training rows when the expert stage begins: not at all (``none``); on the
            ``dense`` model's activations; layer after layer, on inputs of calibrated layers (``sequential``); by one
            threshold for all layers (``common``, see `set_common_level`); by ``pruning`` weights (see
            `least_important`); or as in training, by shifting the logits to the target (``control``, see
            `raise_logits`).
    """

    label: ClassVar[str] = ""
    caveat: ClassVar[str] = ""
    oracle: ClassVar[bool] = False
    reads: ClassVar[Reads] = "input"
    scales: ClassVar[bool] = False
    graded: ClassVar[bool] = True
    needs_expert_size: ClassVar[int | None] = None
    no_target: ClassVar[str] = ""
    optional_target: ClassVar[bool] = False
    sparsity_of: ClassVar[Literal["experts", "weights"]] = "experts"
    keeps_order: ClassVar[bool] = False
    learns: ClassVar[Learns] = "never"
    balance_weight: ClassVar[float] = 1.0
    calibration: ClassVar[Calibration] = "none"

    # What it is

    @classmethod
    def display_name(cls, expert_size: int | None, target_sparsity: float | None) -> str:
        """Returns the label, which may depend on how the method is used; unknown arguments are None."""
        return cls.label or cls.__name__

    @classmethod
    def name_if_missing(cls, expert_size: int | None) -> str:
        """Returns the name under which a report lists the method as missing; "" if it is never listed."""
        return cls.label

    @classmethod
    def describe(cls, expert_size: int | None, target_sparsity: float | None) -> Description:
        """Returns the description that a report reads."""
        return Description(
            label=cls.display_name(expert_size, target_sparsity),
            caveat=cls.caveat,
            rival=cls.name_if_missing(expert_size),
            learns_with_task=cls.learns_with_task(),
            scales=cls.scales,
            graded=cls.graded,
            oracle=cls.oracle,
            prunes=cls.calibration == "pruning",
        )

    @classmethod
    def learns_with_task(cls) -> bool:
        """Says whether the router stage trains it together with the model."""
        return cls.learns in ("efficiency", "balance")

    @classmethod
    def missing_methods(cls) -> list[str]:
        """Returns the methods that the class must define and does not: they are still those of `Selector`."""
        needed = ["forward", "flops_per_token", "make"]
        for (attribute, value), methods in _PROMISED.items():
            needed += methods if getattr(cls, attribute) == value else ()
        return [method for method in needed if _function(cls, method) is _function(Selector, method)]

    # What it needs

    @classmethod
    def check(cls, options: Options) -> None:
        """Checks a configuration that names this selector.

        Raises:
            UserError: If the selector cannot work with it.
        """
        name, target, size = options.selector, options.target_sparsity, cls.needs_expert_size
        lacks = target is None and not cls.optional_target
        if not cls.no_target and (lacks or (target is not None and not 0.0 <= target < 1.0)):
            raise UserError(
                f"selector {name!r} has target_sparsity {target}; it needs the share of the {cls.sparsity_of} that "
                "shall not run, at least 0 and below 1"
            )
        if size is not None and options.expert_size != size:
            neurons = "single neurons" if size == 1 else f"experts of {size} neurons"
            raise UserError(
                f"selector {name!r} selects {neurons}; set expert_size to {size} (it is {options.expert_size})"
            )
        if cls.calibration != "pruning" and (options.wanda_pattern, options.wanda_scope) != ("unstructured", "ffn"):
            raise UserError(
                f"wanda_pattern {options.wanda_pattern} and wanda_scope {options.wanda_scope} are for 'wanda', not for "
                f"selector {name!r}; leave them out"
            )

    @classmethod
    def check_model(cls, options: Options, model: ModelShape) -> None:
        """Checks a model before it is converted.

        Raises:
            UserError: If the selector cannot work with the model.
        """

    @classmethod
    def make(cls, shape: FfnShape, options: Options, generator: torch.Generator | None) -> "Selector":
        """Returns the selector of one FFN.

        Args:
            shape: The FFN's sizes.
            options: The configuration.
            generator: Source of initial weights.
        """
        raise NotImplementedError(f"{cls.__name__} must define make")

    def check_sparsity(self, options: Options) -> None:
        """Checks that the target sparsity can be met with the FFN's experts.

        Raises:
            UserError: If not.
        """

    # How it selects

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the scores [B, T, E]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Returns weight [E, D] and bias [E] if scores are the sigmoid of one linear layer, which a kernel may compute.

        None if only `forward` gives the scores.
        """
        return None

    def sparsify_input(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the input of gate and up projection in hard mode; TEAL sets a part of it to 0."""
        return x_BTD, x_BTD

    # What it costs

    def weight_share(self, x_BTD: torch.Tensor, scores_BTE: torch.Tensor) -> torch.Tensor | None:
        """Returns the share of the FFN's weights that each token uses, [B, T, 1], float32.

        None if that is the share of the experts that run, as for every selection of experts.
        """
        return None

    def flops_per_token(self) -> int:
        """Returns the FLOPs of the selector itself per token: two for each multiply-add."""
        raise NotImplementedError(f"{type(self).__name__} must say its flops_per_token")

    def weights_read(self) -> int:
        """Returns how many of its own weights it reads for a token."""
        # random routers have no parameters, but weights
        return max(sum(parameter.numel() for parameter in self.parameters()), self.flops_per_token() // 2)

    def whole_projections(self) -> int:
        """Returns how many of the FFN's projections are computed whole, for every neuron, before the choice.

        A selector that reads ``gate`` needs the gate projection, or the up projection of a plain FFN. A selector that
        reads ``hidden`` is charged nothing: it must be an oracle, or return here what it computes.
        """
        return int(self.reads == "gate")

    # How it learns

    def imitation_loss(self, activity: Activity) -> torch.Tensor:
        """Returns the selector's error in predicting the dense FFN, a scalar; for ``learns = "imitation"``."""
        raise NotImplementedError(f"{type(self).__name__} must define imitation_loss")

    def balance_loss(self, x_ND: torch.Tensor, scores_NE: torch.Tensor) -> torch.Tensor:
        """Returns the unevenness of the experts' use, a scalar; for ``learns = "balance"``.

        Args:
            x_ND: The FFN's input.
            scores_NE: What `forward` returned for it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define balance_loss")

    # How its sparsity is held

    def controlled(self) -> bool:
        """Says whether its target sparsity is held while it and the model train (see `raise_logits`)."""
        return False

    def raise_logits(self, by: torch.Tensor) -> None:
        """Adds a number, a scalar, to the logits of all experts; for a controlled selector."""
        raise NotImplementedError(f"{type(self).__name__} must define raise_logits")

    # How it is calibrated

    def calibrates(self) -> Calibration:
        """Returns how this selector is calibrated: as its class says, or by its options."""
        return self.calibration

    def sample(self, activity: Activity) -> torch.Tensor:
        """Returns what `calibrate` needs from N training tokens, [N, ...]."""
        raise NotImplementedError(f"{type(self).__name__} must define sample")

    def calibrate(self, sample: torch.Tensor, ffn: Ffn | None = None) -> None:
        """Calibrates itself, for ``dense`` and ``sequential``.

        Args:
            sample: What `sample` returned for all calibration tokens.
            ffn: Runs the FFN.
        """
        raise NotImplementedError(f"{type(self).__name__} must define calibrate")

    def set_common_level(self, level: float) -> None:
        """Sets the level, between 0 and 1, that all layers share; for ``common``. A higher one runs fewer experts."""
        raise NotImplementedError(f"{type(self).__name__} must define set_common_level")

    # How it prunes

    def prune_scope(self) -> Scope:
        """Returns which projections lose weights: ``none``, those of the ``ffn``, or of the ``layers``."""
        return "none"

    def least_important(self, weight_OI: torch.Tensor, norms_I: torch.Tensor) -> torch.Tensor:
        """Returns True for the weights [O, I] to prune.

        Args:
            weight_OI: A projection's weights, a row per output.
            norms_I: L2 norms of its inputs over the calibration tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define least_important")

    def weights_left(self, inputs: int) -> int:
        """Returns how many weights each row of a projection keeps."""
        raise NotImplementedError(f"{type(self).__name__} must define weights_left")

    def set_density(self, density: float) -> None:
        """Notes the share of the FFN's weights that is left."""
        raise NotImplementedError(f"{type(self).__name__} must define set_density")


def _function(kind: type[Selector], method: str) -> object:
    function = getattr(kind, method)
    return getattr(function, "__func__", function)  # a classmethod is bound to another class each time

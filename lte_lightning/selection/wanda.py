"""Wanda: no selection per token; the same weights are pruned for all tokens."""

import torch

from lte_lightning.errors import UserError
from lte_lightning.selection.base import Scope, Selector
from lte_lightning.selection.facts import FfnShape, ModelShape, Options
from lte_lightning.selection.ranking import Ranking
from lte_lightning.selection.registry import register_selector


@register_selector("wanda")
class Wanda(Ranking):
    """Wanda: weights with the smallest |weight| * ||input|| are set to 0, for every token.

    Source: Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter: "A Simple and Effective Pruning Approach for Large
    Language Models", ICLR 2024, arXiv 2306.11695, equation 1. Compared in Table 2 of the paper (see `Router`).

    A weight competes within its row (the weights of one output), or with its neighbours in a pattern such as 2:4. As in
    the authors' code int(sparsity * row) weights of a row are pruned, among equal weights the first. They calibrate on
    128 texts of 2,048 tokens of C4; here it is real tokens of training rows, see ``core/routing/prune.py``.

    Every expert runs, with the remaining weights. Sparsity is the pruned share of the FFN's weights. FLOPs count the
    remaining weights, as if hardware skipped every zero (docs/baselines.md says which hardware does).

    Args:
        shape: The FFN's sizes.
        sparsity: Pruned share of each row.
        generator: Not used.
        pattern: ``unstructured``, or ``2:4`` and the like: of each 4 neighbours.
        scope: What is pruned, the ``ffn`` or the whole ``layers``.
    """

    label = "Wanda"
    caveat = "prunes weights, not neurons; cost assumes that zeros are skipped"
    sparsity_of = "weights"
    keeps_order = True  # patterns count neighbours in the order of the model
    calibration = "pruning"
    density: torch.Tensor

    def __init__(
        self,
        shape: FfnShape,
        sparsity: float,
        generator: torch.Generator | None = None,
        pattern: str = "unstructured",
        scope: Scope = "ffn",
    ) -> None:
        super().__init__(shape, sparsity, generator)
        self.pattern, self.scope = pattern, scope
        self.register_buffer("density", torch.ones(()))  # of the FFN's weights

    @classmethod
    def make(cls, shape: FfnShape, options: Options, generator: torch.Generator | None) -> Selector:
        """Returns the selector of one FFN."""
        return cls(shape, options.target_sparsity or 0.0, generator, options.wanda_pattern, options.wanda_scope)

    @classmethod
    def check(cls, options: Options) -> None:
        """Checks that the pattern agrees with the sparsity.

        Raises:
            UserError: If not.
        """
        super().check(options)
        if options.wanda_pattern != "unstructured" and options.target_sparsity != 0.5:
            raise UserError(
                f"wanda_pattern {options.wanda_pattern} prunes half of the weights, and target_sparsity is "
                f"{options.target_sparsity}; set target_sparsity to 0.5"
            )

    @classmethod
    def check_model(cls, options: Options, model: ModelShape) -> None:
        """Checks that all that is pruned reads the same tokens, and that the pattern divides every row.

        Raises:
            UserError: If not.
        """
        if options.wanda_scope == "layers" and model.stacks > 1:
            raise UserError(
                f"wanda_scope is layers, and {model.model_type!r} has an encoder and a decoder, whose cross-attention "
                "reads both; set wanda_scope to ffn"
            )
        if options.wanda_pattern == "unstructured":
            return
        group = int(options.wanda_pattern[-1])
        for inputs in model.ffn_inputs if options.wanda_scope == "ffn" else model.layer_inputs:
            if inputs % group:
                raise UserError(
                    f"wanda_pattern {options.wanda_pattern} needs rows of a multiple of {group} weights, and this "
                    f"{model.name} has a projection of {inputs} inputs; set it to unstructured"
                )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns ones of shape [B, T, E], float32."""
        return torch.ones((*inputs.shape[:-1], self.shape.experts), dtype=torch.float32, device=inputs.device)

    def weight_share(self, x_BTD: torch.Tensor, scores_BTE: torch.Tensor) -> torch.Tensor:
        """Returns the share of weights that is left, [B, T, 1]."""
        return self.density.float().expand(*scores_BTE.shape[:-1], 1)

    @property
    def reachable(self) -> bool:
        """Whether the sparsity can be met: yes, it is one of weights."""
        return True

    def prune_scope(self) -> Scope:
        """Returns the pruned scope."""
        return self.scope

    def least_important(self, weight_OI: torch.Tensor, norms_I: torch.Tensor) -> torch.Tensor:
        """Returns True for the weights [O, I] to prune, given the norms [I] of the inputs."""
        score_OI = weight_OI.abs().float() * norms_I
        row = self._row(score_OI.shape[1])
        score_OGR = score_OI.unflatten(1, (-1, row))
        gone = score_OGR.argsort(dim=-1, stable=True)[..., : row - self._left(row)]
        return torch.zeros_like(score_OGR, dtype=torch.bool).scatter_(-1, gone, True).flatten(1)

    def weights_left(self, inputs: int) -> int:
        """Returns how many weights each row of a projection keeps."""
        row = self._row(inputs)
        return inputs // row * self._left(row)

    def set_density(self, density: float) -> None:
        """Notes the share of the FFN's weights that is left."""
        self.density.fill_(density)

    def _row(self, inputs: int) -> int:
        return inputs if self.pattern == "unstructured" else int(self.pattern[-1])

    def _left(self, row: int) -> int:
        return row - int(self.sparsity * row)

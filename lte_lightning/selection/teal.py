"""TEAL: thresholds on the inputs of each matrix, with the sparsity allocated greedily between matrices."""

from collections.abc import Callable, Sequence

import torch

from lte_lightning.selection.facts import Activity, Ffn, FfnShape
from lte_lightning.selection.magnitude import Magnitude
from lte_lightning.selection.ranking import level_of
from lte_lightning.selection.registry import register_selector

STEP = 0.025  # by which the sparsity of a block grows at a time


@register_selector("teal")
class Teal(Magnitude):
    """TEAL: each matrix reads only those of its inputs whose magnitude exceeds its threshold.

    Source: James Liu, Pragaash Ponnusamy, Tianle Cai, Han Guo, Yoon Kim, Ben Athiwaratkun: "Training-Free Activation
    Sparsity in Large Language Models", ICLR 2025, arXiv 2408.14690; an input is x where |x| > t, else 0,
    and the allocation is its Algorithm 1.

    Gate and up projection leave out channels of the input x, the down projection leaves out neurons by their
    activation, |hidden|; a weight is used where its input is given. ``target_sparsity``, and the sparsity that is
    reported, are the share of the FFN's weights that a token does not use, the mean over its matrices: the same share
    of weights as that of an expert which does not run. Thresholds come from training rows.

    Cost: the weights that are used. It is not an oracle, because a matrix's inputs are known before it is needed.

    Differences from the authors:

    - They threshold attention's matrices, too, and allocate a block's sparsity between all seven matrices by the error
      at the end of the block. Here attention stays dense, as for every method; the sparsity is allocated between the
      FFN's two or three matrices by the error of the FFN's output.
    - Their error is the norm over the last quarter of each text; here it is over all calibration tokens.
    - They step by 0.05 in units of a D x D matrix and may overshoot. Here a step is 0.025 of the FFN, and the last one
      ends at the target. All blocks have the same sparsity, there and here.
    - They train nothing. Their result corresponds to ``hard_before``.
    """

    label = "TEAL"
    caveat = "skips weights, not neurons"
    needs_expert_size = 1
    sparsity_of = "weights"
    rule = "level"
    calibration = "dense"  # as its authors', unlike CATS's levels
    reads = "hidden"
    input_levels: torch.Tensor

    def __init__(self, shape: FfnShape, sparsity: float, generator: torch.Generator | None = None) -> None:
        super().__init__(shape, sparsity, generator)
        self.matrices = 3 if shape.gated else 2  # gate if there is one, up, down
        self.register_buffer("input_levels", torch.full((self.matrices - 1,), -torch.inf))

    def sparsify_input(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the input of gate and up projection, with 0 for the channels that are left out."""
        size_BTD = x_BTD.abs().float()
        kept = [x_BTD.masked_fill(size_BTD <= level, 0.0) for level in self.input_levels]
        return kept[0], kept[-1]

    def weight_share(self, x_BTD: torch.Tensor, scores_BTE: torch.Tensor) -> torch.Tensor:
        """Returns the share of inputs that a matrix reads, a mean over the matrices, [B, T, 1]."""
        size_BTD = x_BTD.abs().float()
        shares = [(size_BTD > level).float().mean(-1, keepdim=True) for level in self.input_levels]
        return torch.stack([*shares, scores_BTE.mean(-1, keepdim=True)]).mean(0)

    def sample(self, activity: Activity) -> torch.Tensor:
        """Returns the FFN's input, [N, D]: all else follows from it."""
        return activity.x_ND

    @torch.no_grad()
    def calibrate(self, sample: torch.Tensor, ffn: Ffn | None = None) -> None:
        """Sets the levels of all matrices from N inputs [N, D] of the training rows."""
        if ffn is None:
            raise TypeError("TEAL allocates by the error of the FFN's output, so it needs the FFN")
        hidden_NF, dense_ND = ffn.dense(sample)
        self.allocate(sample, hidden_NF, dense_ND, lambda: ffn.hard(sample))

    @torch.no_grad()
    def allocate(
        self, x_ND: torch.Tensor, hidden_NF: torch.Tensor, dense_ND: torch.Tensor, thinned: Callable[[], torch.Tensor]
    ) -> list[float]:
        """Sets the levels of all matrices by the authors' greedy algorithm.

        From nothing left out, the matrix is thinned further whose thinning leaves the smallest error of the FFN's
        output, until the mean sparsity is reached. A level is the quantile of what the dense model gave the matrix.

        Args:
            x_ND: The FFN's input.
            hidden_NF: Its activations in the dense model.
            dense_ND: The dense FFN's output.
            thinned: Returns the output [N, D] with the levels as they are.

        Returns:
            The sparsity of each matrix: gate if there is one, up, down.
        """
        channels = x_ND.abs().float().flatten().sort().values
        tables = [channels] * (self.matrices - 1) + [hidden_NF.abs().float().flatten().sort().values]
        shares = [0.0] * self.matrices
        while (left := self.sparsity - sum(shares) / self.matrices) > 1e-9:
            step = self.matrices * min(STEP, left)
            trials = []
            for i in (i for i, share in enumerate(shares) if share < 1.0):
                trial = [min(1.0, share + step) if i == j else share for j, share in enumerate(shares)]
                self._set_levels(tables, trial)
                trials.append((float((thinned() - dense_ND).float().norm()), trial))
            shares = min(trials)[1]
        self._set_levels(tables, shares)
        return shares

    def _set_levels(self, tables: Sequence[torch.Tensor], shares: Sequence[float]) -> None:
        *inputs, last = [level_of(table, share) for table, share in zip(tables, shares, strict=True)]
        self.input_levels.copy_(torch.tensor(inputs))
        self.level.fill_(last)

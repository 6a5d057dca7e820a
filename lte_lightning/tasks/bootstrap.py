"""Bootstrap draws of an evaluation's metric, for paired comparisons.

The bootstrap of Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. Draw k takes the same rows in every
evaluation of the same number of rows, so that the differences of two evaluations' draws say how well the rows tell
them apart.
"""

import warnings

import torch
from torch import distributed
from torchmetrics import Metric

from lte_lightning.results import json_value

DRAWS = 100
"""How often the rows are drawn anew."""


class RowDraws:
    """Gathers what a metric is updated with, row by row, and draws rows of it with replacement.

    Args:
        metric: A metric of its own, to be computed on the draws.
        name: Which of its values, if it has several.
    """

    def __init__(self, metric: Metric, name: str) -> None:
        self.metric, self.name = metric.cpu(), name
        self._seen: list[tuple[torch.Tensor, ...]] = []

    def update(self, *columns_B: torch.Tensor) -> None:
        """Takes in a batch's rows: what the metric is updated with, each a tensor with a value per row, [B]."""
        self._seen.append(tuple(column_B.detach().cpu() for column_B in columns_B))

    @torch.no_grad()
    def compute(self) -> dict[str, list[float | None]]:
        """Returns ``draws``, the metric on `DRAWS` draws, None where it is not defined, and forgets the rows.

        Nothing if there were no rows, or if other processes have some of them.
        """
        columns_N = [torch.cat(batches) for batches in zip(*self._seen, strict=True)]
        self._seen = []
        if not columns_N or (distributed.is_initialized() and distributed.get_world_size() > 1):
            return {}
        rows = len(columns_N[0])
        generator = torch.Generator().manual_seed(rows)
        found: list[float | None] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a draw may lack a class, or hold one number alone
            for _ in range(DRAWS):
                rows_N = torch.randint(rows, (rows,), generator=generator)
                self.metric.reset()
                self.metric.update(*(column_N[rows_N] for column_N in columns_N))
                value = self.metric.compute()
                found.append(json_value(float(value[self.name] if isinstance(value, dict) else value)))
        return {"draws": found}

"""``lte bench`` with quality: measures each compared model by the metric of the run's task on its validation rows."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from lte_lightning.bench.command import main as bench
from lte_lightning.bench.jobs import Logits
from lte_lightning.errors import UserError

CALIBRATING = 8  # batches


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    return bench(args, RunJudge)


class RunJudge:
    """Computes the metric of a run's task from logits, on all validation rows.

    Args:
        folder: A run, or its model.
        data: A configuration or a text file, in place of the run's own configuration.

    Raises:
        UserError: If no validation rows are known, or the task is neither classification nor language modelling.
    """

    def __init__(self, folder: str, data: str | None) -> None:
        from lte_lightning.cli.rows import load_rows
        from lte_lightning.tasks import Classification, LanguageModel

        self.rows = load_rows(folder, data, torch.device("cpu"))
        if not isinstance(self.rows.module, Classification | LanguageModel):
            raise UserError(
                f"{type(self.rows.module).__name__} is not measured by logits; give --data a configuration for "
                "classification or language modelling"
            )
        self.predicts_next = isinstance(self.rows.module, LanguageModel)
        self.metric = self.rows.module.metric_name

    def __call__(self, logits: Logits) -> float:
        """Returns the metric."""
        module: Any = self.rows.module
        for batch, number in self.rows.validation():
            if number == 0:
                values = logits({key: value for key, value in batch.items() if key != "words"}).float()
                outputs = SimpleNamespace(logits=values, loss=self._loss(values, batch))
                module.meters["dense"].update(*module.outputs_for_metric(outputs, batch))
        return float(module.read_meters("dense")[self.metric])

    def _loss(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if not self.predicts_next:
            return None
        if not batch["attention_mask"][:, 0].all():
            raise UserError("other engines cannot read rows with padding on the left")
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Returns a few training batches, without labels."""
        loader = self.rows.data.train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(CALIBRATING), strict=False)]
        return [{key: value for key, value in batch.items() if key not in ("labels", "words")} for batch in batches]

"""MMLU: which of four letters a model finds most likely."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torchmetrics import Metric

from lte_lightning.core.model.head import run_where_asked
from lte_lightning.data.mmlu import LETTERS, QUESTION_KEYS
from lte_lightning.tasks.language_model import LanguageModel
from lte_lightning.trainer import declared


class SubjectAccuracy(Metric):
    """Accuracy per subject, their mean (macro), and over all questions; sums over devices.

    Args:
        subjects: Names of the subjects.
    """

    full_state_update = False
    right_S: torch.Tensor
    total_S: torch.Tensor

    def __init__(self, subjects: Sequence[str]) -> None:
        super().__init__()
        self.subjects = list(subjects)
        for name in ("right_S", "total_S"):
            self.add_state(name, torch.zeros(len(subjects), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted_B: torch.Tensor, answer_B: torch.Tensor, subject_B: torch.Tensor) -> None:
        """Adds a batch: letters as numbers, and the subjects' numbers."""
        self.total_S += torch.bincount(subject_B, minlength=len(self.subjects))
        self.right_S += torch.bincount(subject_B[predicted_B == answer_B], minlength=len(self.subjects))

    def compute(self) -> dict[str, Any]:
        """Returns ``macro_accuracy``, ``accuracy`` and ``accuracy_per_subject``."""
        asked = {name: total for name, total in zip(self.subjects, self.total_S.tolist(), strict=True) if total}
        right = dict(zip(self.subjects, self.right_S.tolist(), strict=True))
        per_subject = {name: right[name] / total for name, total in asked.items()}
        return {
            "macro_accuracy": sum(per_subject.values()) / len(per_subject),
            "accuracy": sum(right.values()) / sum(asked.values()),
            "accuracy_per_subject": per_subject,
        }


class Mmlu(LanguageModel):
    """Evaluates a causal language model on MMLU: the most likely of " A" to " D" after the prompt, by ``test``.

    Args:
        **kwargs: See `LanguageModel`.
    """

    metric_name = "macro_accuracy"

    def make_metric(self) -> Metric:
        """Returns accuracy per subject."""
        return SubjectAccuracy(declared(self.trainer).datamodule.subjects)

    def run_model(self, batch: dict[str, torch.Tensor], net: Any = None) -> Any:
        """Returns the model's outputs, with the logits before the answer's letter alone."""
        net = self.net if net is None else net
        return run_where_asked(net, {key: value for key, value in batch.items() if key not in QUESTION_KEYS})

    def outputs_for_metric(self, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the chosen letters, the right ones, and the subjects; keeps the likelihoods."""
        likelihoods_B4 = outputs.logits[0].float().log_softmax(-1)[:, declared(self.trainer).datamodule.letter_ids]
        chosen_B = likelihoods_B4.argmax(-1)
        for row, subject, answer, chosen, likelihoods in zip(
            batch["row"], batch["subject"], batch["answer"], chosen_B, likelihoods_B4, strict=True
        ):
            self.predictions.append(
                {
                    "row": int(row),
                    "subject": declared(self.trainer).datamodule.subjects[int(subject)],
                    "prediction": LETTERS[int(chosen)],
                    "answer": LETTERS[int(answer)],
                    "log_likelihoods": [round(value, 4) for value in likelihoods.tolist()],
                }
            )
        return chosen_B, batch["answer"], batch["subject"]

    def by_rows(self, found: Any, outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns what was found: an answer per row."""
        return cast(tuple[torch.Tensor, ...], found)

    def on_test_start(self) -> None:
        """Begins without predictions."""
        super().on_test_start()
        self.predictions = []

    def test_figures(self) -> dict[str, Any]:
        """Gathers the predictions, and returns how many rows they are, had fewer examples or were left out."""
        self.gather_predictions()
        data = declared(self.trainer).datamodule
        scores: dict[str, Any] = {"questions": len(self.predictions), "fewer_shots": data.fewer_shots}
        return scores | ({"skipped_rows": dict(data.skipped)} if data.skipped else {})

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns the letters that a batch is answered with."""
        self.predictions = []
        self.outputs_for_metric(self.run_model(batch), batch)
        return self.predictions

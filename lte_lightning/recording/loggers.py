"""A run's logger in MLflow."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunLogger(MLFlowLogger):
    """MLflow's logger, for which a run's parameters are those that it began with, as MLflow allows no others.

    An evaluation may well have other options than the fit whose run it continues: another batch, type or folder.
    """

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Logs the parameters of a run that has none yet."""
        if not self.experiment.get_run(self.run_id).data.params:
            super().log_hyperparams(params)


def mlflow_of(trainer: Trainer) -> MLFlowLogger | None:
    """Returns the trainer's MLflow logger, if it has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)), None)

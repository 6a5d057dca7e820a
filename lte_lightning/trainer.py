"""Types of the trainer attributes that Lightning does not declare."""

from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


class Declared(Protocol):
    """A trainer's attributes that Lightning sets while it is made or runs.

    Attributes:
        callbacks: All of the fit's.
        datamodule: The data module of the fit, None if the trainer was given loaders. Its class is the user's, so
            nothing is known of what it has besides Lightning's hooks.
        fast_dev_run: How many batches a trial run has; False in a real one.
        log_every_n_steps: After how many steps loggers are told something.
        reload_dataloaders_every_n_epochs: After how many epochs loaders are made anew; 0 never.
    """

    callbacks: "list[Callback]"
    datamodule: Any
    fast_dev_run: bool | int
    log_every_n_steps: int
    reload_dataloaders_every_n_epochs: int


def is_first_process() -> bool:
    """Says whether this process prints and writes, the first of those that fit together."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank == 0


def declared(trainer: "Trainer") -> Declared:
    """Returns the trainer itself, with its undeclared attributes typed."""
    return cast(Declared, trainer)

"""One-line errors for damaged checkpoints, whatever torch and Lightning raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lte_lightning.errors import UserError


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns the errors of reading a checkpoint into one line.

    Raises:
        UserError: For every error but a lack of memory.
    """
    try:
        yield
    except (UserError, MisconfigurationException, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"the checkpoint {path} is damaged, or lte-lightning did not write it ({type(error).__name__}: {line}); "
            "resume from another one, or begin anew"
        ) from error


def guard_checkpoints(trainer: Trainer) -> None:
    """Makes a trainer refuse a checkpoint of which any part is damaged."""
    connector: Any = trainer._checkpoint_connector

    def guarded(restore: Callable[..., None]) -> Callable[..., None]:
        @wraps(restore)
        def call(*args: Any, **kwargs: Any) -> None:
            path = args[0] if args else trainer.ckpt_path  # the first of them is given the path, which Lightning keeps
            with nullcontext() if path is None else reading(path):
                restore(*args, **kwargs)

        return call

    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, guarded(getattr(connector, name)))

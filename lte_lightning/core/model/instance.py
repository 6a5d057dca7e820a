"""Hugging Face's methods for a converted model, which write and read its routers, too.

`adopt` gives a model a new class with the same name, which derives from the model's original class.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.hub import push_folder
from lte_lightning.core.model.routers import with_routers
from lte_lightning.core.model.saving import save_into

_PUSH = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


class ExpertMethods:
    """Overrides of `PreTrainedModel` for a model with expert FFNs. Without these FFNs, the original methods run."""

    plain_class: type[PreTrainedModel]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes the files of `lte_lightning.save_pretrained` into a folder, beside other files there.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes; of several processes only one does.
            **kwargs: Those of `PreTrainedModel.save_pretrained`: ``state_dict``, ``max_shard_size``, ``push_to_hub``,
                ...

        Raises:
            UserError: If the saved model could not be loaded again.
        """
        if not expert_ffns(self):  # type: ignore[arg-type]
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        elif is_main_process:
            uploads = kwargs.pop("push_to_hub", False)
            options = {key: kwargs.pop(key) for key in _PUSH if key in kwargs}
            folder = save_into(self, Path(save_directory), **kwargs)  # type: ignore[arg-type]
            if uploads:
                push_folder(folder, options.pop("repo_id", folder.name), **options)

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "50GB", tags: list[str] | None = None, **kwargs: Any
    ) -> str:
        """Uploads the files of `save_pretrained`.

        Args:
            repo_id: The repository, which is created if there is none.
            max_shard_size: The largest size of a weights file.
            tags: Further tags of the model card.
            **kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr``.

        Returns:
            The commit's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(Path(folder), repo_id, tags=tags, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads weights under plain names or names in memory (see `names`), and the routers that belong to them.

        Raises:
            UserError: If there are no such routers, and the model's routers belong to other weights.
        """
        return super().load_state_dict(with_routers(self, state_dict), strict, assign)  # type: ignore[misc,arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not _is_adopted(self):
            return reduced
        # A pickle finds classes by name, and by this class's name it would find the plain class.
        return (_new, (self.plain_class,), *reduced[2:])


def adopt(model: Any) -> None:
    """Gives a converted model `ExpertMethods`."""
    model.__class__ = _with_methods(type(model))


def release(model: Any) -> None:
    """Undoes `adopt`."""
    if _is_adopted(model):
        model.__class__ = model.plain_class


def _is_adopted(model: Any) -> bool:
    # FSDP puts its own class on top of this class, and that stays.
    return isinstance(model, ExpertMethods) and type(model) is _with_methods(model.plain_class)


_MADE: dict[Any, Any] = {}


def _with_methods(plain_class: Any) -> Any:
    if plain_class not in _MADE:
        names = {"__module__": plain_class.__module__, "__qualname__": plain_class.__qualname__}
        body = names | {"__doc__": plain_class.__doc__, "plain_class": plain_class}
        _MADE[plain_class] = type(plain_class.__name__, (ExpertMethods, plain_class), body)
    return _MADE[plain_class]


def _new(plain_class: Any) -> Any:
    made = _with_methods(plain_class)
    return made.__new__(made)

"""Uploading a folder to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig

from lte_lightning.core.model.card import README, write_card
from lte_lightning.core.model.folder import read_description

# What training leaves beside a model is large, and of no use to others.
_LEFT_BEHIND = ["checkpoint-*/**", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"]


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: list[str] | None = None,
    **kwargs: Any,
) -> str:
    """Uploads a saved model, its card by the name of the repository.

    Args:
        folder: Where it lies.
        repo_id: The repository; it is made if there is none.
        private: Whether a new one is private; by default as the owner's settings say.
        token: Of the hub; by default that of ``hf auth login``.
        tags: Further tags of the model card.
        **kwargs: Passed to ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...

    Returns:
        The commit's address.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_card(folder, read_description(folder), AutoConfig.from_pretrained(folder), repo_id)
    if tags:
        card = ModelCard.load(folder / README)
        card.data.tags = [*dict.fromkeys([*(card.data.tags or []), *tags])]
        card.save(folder / README)
    kwargs = {"commit_message": "Upload model"} | kwargs
    return str(api.upload_folder(folder_path=folder, repo_id=repo_id, ignore_patterns=_LEFT_BEHIND, **kwargs))

"""Upload a folder to the Hugging Face hub, or write it in the form of the hub's cache."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoConfig

from lte_lightning.core.model.card import README, write_card
from lte_lightning.core.model.folder import read_description
from lte_lightning.errors import UserError
from lte_lightning.files import exchange, sync_all, write_text

# Files that training leaves beside a model. They are large, and of no use to others.
_LEFT_BEHIND = ["checkpoint-*/**", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"]


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: list[str] | None = None,
    **kwargs: Any,
) -> str:
    """Uploads a saved model. Its card then names the repository.

    Args:
        folder: The model's folder.
        repo_id: The repository, which is created if there is none.
        private: Whether a new repository is private; by default as the owner's settings say.
        token: The hub's token; by default that of ``hf auth login``.
        tags: Further tags of the model card.
        **kwargs: Passed to ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...

    Returns:
        The commit's address.

    Raises:
        UserError: If the hub refuses the upload or is out of reach.
    """
    try:
        return _upload(folder, repo_id, private, HfApi(token=token), tags or [], **kwargs)
    except (HTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"cannot upload to {repo_id}: {first} (log in with `hf auth login` or HF_TOKEN, and leave "
            "HF_HUB_OFFLINE unset)"
        ) from None  # the hub's own traceback has a hundred lines


def _upload(folder: Path, repo_id: str, private: bool | None, api: HfApi, tags: list[str], **kwargs: Any) -> str:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_card(folder, read_description(folder), AutoConfig.from_pretrained(folder), repo_id)
    if tags:
        card = ModelCard.load(folder / README)
        card.data.tags = [*dict.fromkeys([*(card.data.tags or []), *tags])]
        card.save(folder / README)
    kwargs = {"commit_message": "Upload model"} | kwargs
    return str(api.upload_folder(folder_path=folder, repo_id=repo_id, ignore_patterns=_LEFT_BEHIND, **kwargs))


def store_folder(folder: Path, repo_id: str, cache: Path, revision: str = "main") -> Path:
    """Writes a saved model to a folder in the form of the hub's cache, as if it had been downloaded.

    A program that reads the hub finds it there by its name, with ``HF_HUB_CACHE`` (or ``cache_dir=``), without a
    connection.

    Args:
        folder: The model's folder.
        repo_id: The model's name, OWNER/NAME.
        cache: The cache; it may hold other models, and other versions of this one.
        revision: The branch.

    Returns:
        The model's folder within the cache.
    """
    place = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
    staging = place / "snapshots" / "new.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    digest = hashlib.sha1(usedforsecurity=False)
    for name in filter_repo_objects(names, ignore_patterns=_LEFT_BEHIND, key=str):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, staging / name)
    write_card(staging, read_description(folder), AutoConfig.from_pretrained(folder), repo_id)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(staging).as_posix()} {content}\n".encode())
    commit = digest.hexdigest()  # as long as the hub's commits, and equal for equal files
    sync_all(staging)
    exchange(staging, place / "snapshots" / commit)
    shutil.rmtree(staging, ignore_errors=True)  # what `exchange` took from the place, the same files
    (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    write_text(place / "refs" / revision, commit)
    return place / "snapshots" / commit

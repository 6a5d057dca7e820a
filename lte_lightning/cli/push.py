"""``lte push``: a saved model to the Hugging Face hub."""

from pathlib import Path

from lte_lightning.errors import UserError
from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: See `push`.
    """
    call(push, "lte push", args, positional=("folder", "repository"))


def push(
    folder: str,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    pull_request: bool = False,
    cache: str | None = None,
) -> None:
    """Uploads a saved LTE model to the Hugging Face hub, with its routers and its model card.

    lte push RUN OWNER/NAME
    lte push RUN OWNER/NAME --cache FOLDER

    Args:
        folder: A saved LTE model or a run's folder.
        repository: OWNER/NAME on the hub; it is made if there is none.
        private: Make a new repository private.
        revision: Branch to upload to; main by default.
        message: The commit's message.
        pull_request: Open a pull request and leave the branch as it is.
        cache: Write to this folder in place of the hub, in the form of the hub's cache. With HF_HUB_CACHE=FOLDER and
            HF_HUB_OFFLINE=1 whatever reads the hub finds OWNER/NAME there.

    Raises:
        UserError: If the repository is not OWNER/NAME, options do not go together, the folder holds no saved LTE model
            or a damaged one, or the hub refuses it or is out of reach.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from lte_lightning.core.model.folder import find_saved
    from lte_lightning.core.model.hub import push_folder, store_folder
    from lte_lightning.core.model.loading import from_pretrained

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"the repository is {repository!r}, but must be OWNER/NAME; to write to a folder, add --cache FOLDER"
        ) from error
    if cache is not None and (private or pull_request):
        raise UserError("a folder (--cache) is neither private nor has pull requests: leave these options out")
    saved = find_saved(folder)
    from_pretrained(saved, backend="dense-mask")  # what others could not load is not published
    if cache is not None:
        print(store_folder(saved, repository, Path(cache), revision or "main"))
        return
    print(
        push_folder(
            saved,
            repository,
            private=private or None,
            commit_message=message,
            revision=revision,
            create_pr=pull_request,
        )
    )

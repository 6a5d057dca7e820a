"""``lte push``: a saved model to the Hugging Face hub."""

import argparse
from pathlib import Path

from huggingface_hub.errors import HTTPError

from lte_lightning.core.model.checkpoint import from_pretrained
from lte_lightning.core.model.folder import is_lte
from lte_lightning.core.model.hub import push_folder
from lte_lightning.errors import UserError


def main(args: list[str]) -> None:
    """Runs the command; the address of the commit is printed.

    Raises:
        UserError: If the folder holds no saved LTE model or a damaged one, or the hub refuses it or is out of reach.
    """
    options = _parser().parse_args(args)
    folder = Path(options.folder)
    if not folder.is_dir() or not is_lte(folder):
        raise UserError(f"{folder} is no folder of a saved LTE model (a run's folder model/ is one)")
    from_pretrained(folder, backend="dense-mask")  # what others could not load is not published
    try:
        address = push_folder(
            folder,
            options.repository,
            private=options.private or None,
            commit_message=options.message,
            revision=options.revision,
            create_pr=options.pull_request,
        )
    except (HTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot upload to {options.repository}: {first} (log in by `hf auth login` or HF_TOKEN, and leave "
            "HF_HUB_OFFLINE unset)"
        ) from error
    print(address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lte push",
        description="Uploads a saved LTE model to the Hugging Face hub, with its routers and its model card.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder of a saved LTE model, such as RUN/model")
    parser.add_argument("repository", help="OWNER/NAME on the hub; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to (default: main)")
    parser.add_argument("--message", default="Upload model", help="the commit's message (default: Upload model)")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request and leave the branch as it is")
    return parser

"""Run folders and MLflow's stores: their files, addresses without secrets, and the embedded database.

MLflow itself makes that database as if nobody else did, and as if it were never interrupted.
"""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lte_lightning.errors import UserError
from lte_lightning.files import abridged, hold_folder, read_json

RUN_LAYOUT = 1  # of a run folder, in its run.json: what reads one refuses another


def find_run(origin: str) -> Path | None:
    """Returns the run's folder that a file or folder lies in, if it lies in one."""
    return next((parent for parent in Path(origin).absolute().parents if (parent / "run.json").exists()), None)


def require_writable(folder: Path) -> None:
    """Makes a folder of runs, and checks that it can be written to.

    Raises:
        UserError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write runs to {folder}: {error}; choose another folder with run.root") from error


def read_run_file(run: Path) -> dict[str, Any]:
    """Returns a run's ``run.json``.

    Raises:
        UserError: If it is damaged, or the run folder is of another version.
    """
    file, way_out = run / "run.json", "leave this run out"
    try:
        about = read_json(file, way_out)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}; {way_out}") from error
    for key in ("experiment", "run_id", "tracking_uri", "name"):
        if not isinstance(about.get(key), str | None):
            raise UserError(f"{file} is damaged: {key} is {abridged(about[key])}, which is no text; {way_out}")
    layout = about.get("layout", RUN_LAYOUT)  # one that names none was written before there were any
    if layout != RUN_LAYOUT:
        raise UserError(
            f"run folder {run} has layout {abridged(layout)}, this lte-lightning reads {RUN_LAYOUT}; use the version "
            "that wrote it, or leave this run out"
        )
    return about


STORE = "run.tracking_uri"
"""The option of MLflow's store."""


def mlflow_store(*named: str | None) -> str:
    """Returns the first of MLflow's stores that is named, or ``mlflow.db`` here; of a database the absolute path."""
    uri = next(filter(None, named), "sqlite:///mlflow.db")
    if uri.startswith("sqlite:///"):  # who comes later may stand in another folder
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def users_store() -> str:
    """Returns the store that the user names by ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` here."""
    return mlflow_store(os.environ.get("MLFLOW_TRACKING_URI"))


def keeps_run(uri: str) -> bool:
    """Says whether the store that a run's file names may still have the run: a server, or a database that is there."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def shown(address: str) -> str:
    """Returns a store's address as messages and files may have it: of a server, without its user, password, options."""
    if re.match(r"(sqlite|file):|[./]", address):
        return address
    return re.sub(r"\?.*", "?***", re.sub(r"^([\w+]*:?/*).*@", r"\1***@", address))


def whole(address: str) -> str:
    """Returns the address; raises if its password was removed.

    Raises:
        UserError: If it was.
    """
    if "***" in address:
        raise UserError(
            f"MLflow's store {address} was kept without its password: give its whole address by MLFLOW_TRACKING_URI, "
            "or record nothing with --trainer.logger false"
        )
    return address


def named_by_file(uri: str | None, own: str, where: Path) -> str:
    """Returns the address of the store that a file names, with the password of the user's address of it.

    Files may come from anybody. A server that one names gets no credentials of the environment, unless it is the host
    that the user names.

    Args:
        uri: What the file says.
        own: The store that the user names.
        where: The file.

    Raises:
        UserError: If it would get credentials, or was kept without its password.
    """
    if not uri or uri == shown(own):
        return own
    other = _host(uri) is None or _host(uri) != _host(own)
    if other and not re.match(r"(sqlite|file):|[./]", uri) and (secrets := _credentials(uri)):
        raise UserError(
            f"{where} names MLflow's store {shown(uri)}, which would be sent {secrets}; if you trust it, name it "
            "yourself by MLFLOW_TRACKING_URI, otherwise record nothing with --trainer.logger false"
        )
    return whole(uri)


def _host(address: str) -> tuple[str, str | None, int | None] | None:
    """Returns scheme, host and port; None if there are none that every library would read alike."""
    if not re.fullmatch(r"[!-\[\]-~]+", address):  # a backslash ends the host for some, and belongs to it for others
        return None
    try:
        parts = urlsplit(address)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        return None


def _credentials(uri: str) -> str | None:
    """Returns which credentials of the user's a client of this store would use without being told to."""
    names = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
    found = [name for name in (*(f"MLFLOW_TRACKING_{name}" for name in names), "PGPASSWORD") if os.environ.get(name)]
    # os.path.expanduser, for Path.home() raises for a user without a home
    files = [os.path.expanduser("~/.mlflow/credentials")]
    if uri.startswith("postgresql"):
        files.append(os.environ.get("PGPASSFILE") or os.path.expanduser("~/.pgpass"))
    if uri.startswith("http"):
        from requests.utils import get_netrc_auth

        netrc = [os.environ.get("NETRC") or os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
        files += netrc if _host(uri) is None or get_netrc_auth(uri) else []
    return next(iter([*found, *filter(os.path.exists, files)]), None)


def reason(error: object) -> str:
    """Returns an error of a store's client on one line, without passwords and what follows a question mark.

    An error that is raised with it must hide the client's own (``raise ... from None``), which a traceback would show.
    """
    # What follows the first @ in a password is taken for a host and a port, and quoted as such
    masked = re.sub(r"\S*@", "***@", " ".join(str(error).split()))
    return re.sub(r"\?\S+", "?***", masked)[:300]


@contextmanager
def first_contact(uri: str) -> Iterator[None]:
    """Lets one process at a time create and open an embedded database, so that it is whole or absent.

    Of fits that begin together all but one would fail, and one that is killed while the tables are made would leave a
    database that nobody can use. Other stores see to that themselves. MLflow prints where a run can be seen, but of an
    address with a password not even that.

    Args:
        uri: ``sqlite:///PATH``, or any other of MLflow's stores.
    """
    if uri != shown(uri):
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    if not uri.startswith("sqlite:///"):
        yield
        return
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    with hold_folder(file.parent):
        if file.parent.is_dir() and not file.exists():
            _make(file)
        yield


def _make(file: Path) -> None:
    from mlflow.tracking import MlflowClient

    staging = file.with_name(f"{file.name}.new")
    for left in (staging, staging.with_name(f"{staging.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{staging}")
    staging.rename(file)

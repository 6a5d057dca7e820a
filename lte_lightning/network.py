"""Fails fast where a server or a database does not answer, and tells a wrong address from one that is away."""

import http.client
import re
import socket
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from lte_lightning.errors import UserError
from lte_lightning.store import reason, shown

SECONDS = 5  # for a connection
PATIENCE = 20  # for an answer
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class AwayError(UserError):
    """Nobody answers where somebody may well answer later."""


def reach(address: str, what: str, instead: str = "start it, or give another address") -> None:
    """Connects to an address once, to fail fast instead of after a client's many tries.

    Args:
        address: ``host:port``, with or without ``scheme://``.
        what: Who should listen there.
        instead: What to do if nobody does.

    Raises:
        AwayError: If nobody listens.
        UserError: If it is no address, or of no machine that is known.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"{shown(address)!r} is no address of {what}; give host:port")
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except (OSError, UnicodeError) as error:  # the latter: a name with parts that are too long
        kind = UserError if isinstance(error, socket.gaierror | UnicodeError) else AwayError
        why = getattr(error, "strerror", None) or error
        raise kind(f"cannot reach {what} at {shown(address)}: {why}; {instead}") from error


def ask(uri: str, what: str, instead: str = "give another address", patience: float | None = None) -> None:
    """Asks a web server once, to fail within seconds when it never answers.

    Args:
        uri: ``http://`` or ``https://`` and so on.
        what: Who should answer there.
        instead: What to do if nobody does.
        patience: Seconds to wait for an answer.

    Raises:
        AwayError: If nobody listens, or who listens does not answer.
        UserError: If it is no address, or of no machine that is known.
    """
    reach(uri, what, instead)
    page = re.sub("//.*@", "//", f"{uri.rstrip('/')}/health")  # it takes no password
    try:
        urlopen(page, timeout=PATIENCE if patience is None else patience).close()
    except HTTPError as error:
        error.close()  # an answer, too: not every server has that page, or shows it to strangers
    except (URLError, OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if not isinstance(cause, ssl.SSLError):  # whom to trust is for the client to say
            why = reason(cause) or type(error).__name__
            raise AwayError(f"{what} at {shown(uri)} does not answer: {why}; {instead}") from None


def failures() -> tuple[type[Exception], ...]:
    """Returns the errors that MLflow raises for a store that cannot be used."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, UserError


def try_store(uri: str) -> None:
    """Looks whether MLflow's store can be used, within ten seconds: MLflow itself would try for minutes.

    Args:
        uri: Of a server or a database.

    Raises:
        AwayError: If it cannot be used now: nobody answers, or the database is locked, damaged or full.
        UserError: If the address, the password or the installation is wrong.
    """
    advice = "correct MLFLOW_TRACKING_URI or run.tracking_uri, or record nothing with --trainer.logger false"
    if uri.startswith(("http://", "https://")):
        ask(uri, "the MLflow server", advice, patience=3)
    elif uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if file.exists():
            try:
                with closing(sqlite3.connect(file, timeout=3)) as database:
                    database.execute("BEGIN IMMEDIATE")  # whether it can be written to, too
                    database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                    database.rollback()
            except sqlite3.Error as error:
                raise AwayError(f"the MLflow database {file} cannot be used: {error}") from error
    elif re.match(rf"({'|'.join(PORTS)})(\+\w+)?://[^/?#]", uri):  # others, such as databricks://, MLflow knows itself
        reach(uri, "the MLflow database", advice)
        _log_in(uri, advice)


def _log_in(uri: str, advice: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        create_engine(uri).connect().close()
    except (SQLAlchemyError, ImportError, ValueError) as error:  # a password, a name, a driver
        raise UserError(f"the MLflow database {shown(uri)} cannot be used: {reason(error)}; {advice}") from None

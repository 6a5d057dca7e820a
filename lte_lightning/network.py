"""Fails fast where a server or a database does not answer, and tells a wrong address from one that is away."""

import http.client
import os
import re
import socket
import sqlite3
import ssl
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from lte_lightning.errors import UserError
from lte_lightning.store import reason, shown

SECONDS = 5  # for a connection
PATIENCE = 4  # for an answer
ALTOGETHER = 9
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
IN_FIT = "correct MLFLOW_TRACKING_URI or run.tracking_uri, or record nothing with --trainer.logger false"


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


def _ask(uri: str, what: str, instead: str) -> None:
    reach(uri, what, instead)
    page = re.sub("//.*@", "//", f"{uri.rstrip('/')}/health")  # it takes no password
    try:
        with urlopen(page, timeout=PATIENCE) as answer:
            answer.read(1000)
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


def try_store(uri: str, instead: str = IN_FIT) -> None:
    """Looks whether MLflow's store can be used, within ten seconds, and has MLflow's client try each request twice.

    MLflow itself would try for minutes, and a database for an hour.

    Args:
        uri: Of a server or a database.
        instead: What to do if it cannot be used.

    Raises:
        AwayError: If it cannot be used now: nobody answers, or the database is locked, damaged or full.
        UserError: If the address, the password or the installation is wrong.
    """
    if uri.startswith(("http://", "https://")):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        _in_time(lambda: _ask(uri, "the MLflow server", instead), uri, instead)
    elif uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if file.exists():
            try:
                with closing(sqlite3.connect(file, timeout=3)) as database:
                    can_write = os.access(file, os.W_OK)  # a report needs no more than to read
                    database.execute("BEGIN IMMEDIATE" if can_write else "BEGIN")
                    database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                    database.rollback()
            except sqlite3.Error as error:
                raise AwayError(f"the MLflow database {file} cannot be used: {error}; {instead}") from error
    elif re.match(rf"({'|'.join(PORTS)})(\+\w+)?://[^/?#]", uri):  # others, such as databricks://, MLflow knows itself
        _in_time(lambda: _log_in(uri, instead), uri, instead)


def _log_in(uri: str, instead: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = create_engine(uri)
        reach(uri, "the MLflow database", instead)
        engine.connect().close()
    except UserError:
        raise
    except (SQLAlchemyError, ImportError, ValueError) as error:  # a password, a name, a driver
        driver = "install the database's driver, or " if isinstance(error, ImportError) else ""
        message = f"the MLflow database {shown(uri)} cannot be used: {reason(error)}; {driver}{instead}"
        raise UserError(message) from None


def _in_time(contact: Callable[[], None], uri: str, instead: str) -> None:
    """Runs what contacts a store, in a thread that is left alone when the store keeps it waiting.

    A limit for each byte does not bound slow bytes, and drivers of databases have no common limit.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            contact()
        except Exception as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(ALTOGETHER)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise AwayError(f"MLflow's store {shown(uri)} does not answer within {ALTOGETHER} seconds; {instead}")


def new_run(client: Any, uri: str, experiment: str, **how: Any) -> str:
    """Makes a run in MLflow's store; returns its id.

    Raises:
        AwayError: If the answer has no id: what answers everything by nothing is no MLflow server.
    """
    run_id: str = client.create_run(experiment, **how).info.run_id
    if not run_id:
        raise AwayError(f"MLflow's store {shown(uri)} cannot be used: its answer names no run")
    return run_id

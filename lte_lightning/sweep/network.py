"""Whether somebody listens."""

import http.client
import re
import socket
import ssl
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from lte_lightning.errors import UserError
from lte_lightning.store import shown

SECONDS = 5  # for a connection
PATIENCE = 20  # for an answer


def reach(address: str, what: str, instead: str = "start it, or give another address") -> None:
    """Connects to an address once, so that a wrong one is said at once and not after a client's many tries.

    Args:
        address: ``host:port``, with or without ``scheme://``.
        what: Who should listen there.
        instead: What to do if nobody does.

    Raises:
        UserError: If it is no address, or nobody listens.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"{shown(address)!r} is no address of {what}; give host:port")
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        raise UserError(f"cannot reach {what} at {shown(address)}: {error.strerror or error}; {instead}") from error


def ask(uri: str, what: str, instead: str = "give another address") -> None:
    """Asks a web server for anything once, so that one that never answers is said so within seconds.

    Args:
        uri: ``http://`` or ``https://`` and so on.
        what: Who should answer there.
        instead: What to do if nobody does.

    Raises:
        UserError: If it is no address, nobody listens, or who listens does not answer.
    """
    reach(uri, what, instead)
    try:
        urlopen(re.sub("//.*@", "//", f"{uri.rstrip('/')}/health"), timeout=PATIENCE).close()  # it takes no password
    except HTTPError as error:
        error.close()  # an answer, too: not every server has that page, or shows it to strangers
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # whom to trust is for the client to say
            raise UserError(
                f"{what} at {shown(uri)} does not answer: {reason or type(error).__name__}; {instead}"
            ) from error

"""Whether somebody listens."""

import socket
from urllib.parse import urlsplit

from lte_lightning.core.errors import UserError

SECONDS = 5


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
        raise UserError(f"{address!r} is no address of {what}; give host:port")
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        raise UserError(f"cannot reach {what} at {address}: {error.strerror or error}; {instead}") from error

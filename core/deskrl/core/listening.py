"""Listening sockets: whether a server can listen on an address, and the error for users if it cannot."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping

from deskrl.core.addresses import format_address
from deskrl.core.errors import UserError

_HOST_KEYS: Mapping[str, str] = {
    "replay.address": "replay.listen_host",
    "inference.address": "inference.listen_host",
    "inference.openai_port": "inference.openai_host",
}
"""Key of the host of each port; for all others (metrics) it is security.metrics_host."""
_NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind_error(host: str, port: int) -> OSError | None:
    """Return why no server can listen on a port at present; None if one can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:  # includes socket.gaierror for an unknown host name
        return error
    return None


def listen_error(key: str, host: str, port: int, error: OSError) -> UserError:
    """Return the error for users of a server that cannot listen on its address; the hint follows from the cause.

    Args:
        key: configuration key of the port.
        host: host of the address.
        port: port of the address.
        error: error of the attempt.
    """
    return UserError(
        f"{key}: cannot listen on {format_address(host, port)}: {error.strerror}", listen_error_hint(error, key)
    )


def listen_error_hint(error: OSError, key: str) -> str:
    """Return what to do about an address on which a server cannot listen.

    Args:
        error: error of the attempt.
        key: configuration key of the port.
    """
    host_key = _HOST_KEYS.get(key, "security.metrics_host")
    if isinstance(error, socket.gaierror) or error.errno in _NO_ADDRESS:
        return f"set {host_key} to an address of this machine"
    if error.errno == errno.EACCES:
        return f"set {key} to a port above 1023, because this user may not use lower ones"
    return f"set {key} to a free port"

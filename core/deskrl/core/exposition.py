"""A role's Prometheus port, opened the same way in every role. Knows no metric."""

from __future__ import annotations

import errno

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from deskrl.core.errors import UserError


def expose(host: str, port: int, key: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Answer Prometheus at `host:port`; port 0: not at all.

    Args:
        host: to listen at; nobody is asked who he is.
        port: to listen on.
        key: of the configuration, that a person would change.
        registry: of the metrics.

    Raises:
        UserError: it cannot be listened on.
    """
    if port == 0:
        return
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        reason = f"metrics port {host}:{port} cannot be listened on: {error.strerror}"
        raise UserError(reason, mend_for(error, key)) from error


def mend_for(error: OSError, key: str) -> str:
    """What to change where a metrics port cannot be listened on: the port, by its key, or else the host."""
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        return f"set {key} to a free port"
    return "set security.metrics_host to an address of this machine"

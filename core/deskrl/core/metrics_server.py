"""Prometheus endpoint of a role."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Info, start_http_server

from deskrl.core import rpc
from deskrl.core.listening import listen_error


def serve_metrics(host: str, port: int, key: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Serve metrics at `host:port` in a background thread, without authentication.

    Args:
        host: address to listen on.
        port: port to listen on; 0 disables the endpoint.
        key: configuration key of the port, for the hint.
        registry: metrics to serve.

    Raises:
        UserError: the address cannot be listened on.
    """
    if port == 0:
        return
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise listen_error(key, host, port, error) from error
    if (run := rpc.current_run()) is not None:
        info = {"name": run.name, "id": run.id, "host": run.host}
        Info("deskrl_run", "Run that this process belongs to", registry=registry).info(info)

"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import contextlib
import secrets
import socket

# Below the ports that the kernel gives to outgoing connections, one of which would otherwise occupy the port of a
# service while it restarts: even a client of that service, which tries to connect until it is back.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a port on which no process listens at the moment of the call."""
    (port,) = free_ports(1)
    return port


def free_ports(num: int) -> list[int]:
    """Return `num` consecutive free ports; the actors of a run use consecutive ports."""
    while True:
        first = secrets.choice(_PORTS[: len(_PORTS) - num + 1])
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + num):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + num))


def free_address() -> str:
    """Return a free address as `host:port`."""
    return f"127.0.0.1:{free_port()}"

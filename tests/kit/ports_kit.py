"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import contextlib
import socket


def free_port() -> int:
    """Return a port on which no process listens at the moment of the call."""
    (port,) = free_ports(1)
    return port


def free_ports(num: int) -> list[int]:
    """Return `num` consecutive free ports; the actors of a run use consecutive ports."""
    while True:
        with contextlib.ExitStack() as probes:
            first = probes.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            ports = [int(first.getsockname()[1])]
            with contextlib.suppress(OSError, OverflowError):
                while len(ports) < num:
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", ports[-1] + 1))
                    ports.append(ports[-1] + 1)
                return ports


def free_address() -> str:
    """Return a free address as `host:port`."""
    return f"127.0.0.1:{free_port()}"

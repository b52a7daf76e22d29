"""Ports of the loopback interface that nobody listens on at this moment."""

from __future__ import annotations

import contextlib
import socket


def free_port() -> int:
    """One."""
    (port,) = free_ports(1)
    return port


def free_ports(num: int) -> list[int]:
    """So many, one after another: roles of a run count their ports up."""
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
    """One, as `host:port`."""
    return f"127.0.0.1:{free_port()}"

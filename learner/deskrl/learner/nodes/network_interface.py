"""Network interface over which the ranks of this machine reach those of other nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import psutil

_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""Variables in which gloo and NCCL expect the name; NCCL takes a name without `=` as the beginning of several."""


def set_network_interface(other: str, port: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo and NCCL use the interface that leads to another node, unless the environment names one.

    Otherwise gloo uses the address that the host's name stands for, often a loopback address.

    Args:
        other: host name or address of the other node.
        port: any port of it.
        environment: environment variables of this process, which ranks inherit.
    """
    own = address_towards(other, port)
    name = None if own is None else _interface_of(own)
    for variable, form in _VARIABLES.items() if name is not None else ():
        environment.setdefault(variable, form.format(name))


def address_towards(other: str, port: int) -> str | None:
    """Return the address from which this machine sends packets to another one; None if that is unknown."""
    try:
        family, _, _, _, target = socket.getaddrinfo(other, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # chooses the route, sends nothing
            return str(probe.getsockname()[0])
    except OSError:  # includes socket.gaierror
        return None


def _interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None

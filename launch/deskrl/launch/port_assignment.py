"""Free ports for a run on this machine, so that several runs and evaluations can be in progress at the same time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Self

from deskrl.core import rpc
from deskrl.core.addresses import HostPort
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

PORT_KEYS = frozenset(
    {
        "replay.address",
        "replay.listen_host",
        "replay.metrics_port",
        "inference.address",
        "inference.listen_host",
        "inference.metrics_port",
        "inference.openai_host",
        "inference.openai_port",
        "actor.metrics_port",
        "learner.metrics_port",
        "learner.master_port",
        "security.metrics_host",
    }
)
"""Keys that say where a run listens. They have no influence on its results and may change when it is resumed."""
_MAX_ATTEMPTS = 1000


class _PortRange(NamedTuple):
    """Consecutive ports that a key names by the first one."""

    key: str
    host: str
    num: int


class PortReservation:
    """Holds ports for the roles of a run until it is closed; a context manager.

    A reserved port is bound but does not listen: the kernel gives it to no other process that asks for a free port,
    and lets the role listen on it, because both set SO_REUSEADDR.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the ports."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def try_hold(self, host: str, first: int, num: int) -> bool:
        """Reserve consecutive ports; returns whether all of them are free."""
        with contextlib.ExitStack() as opened:
            sockets = []
            for port in range(first, first + num):
                try:
                    sockets.append(opened.enter_context(_bind(host, port)))
                except (OSError, OverflowError):
                    return False
            self._sockets += sockets
            opened.pop_all()
        return True

    def hold_any(self, host: str, num: int, excluded: Collection[int]) -> int:
        """Reserve any consecutive free ports and return the first one.

        Raises:
            UserError: there are no such ports, or the host is not an address of this machine.
        """
        for _ in range(_MAX_ATTEMPTS):
            try:
                with _bind(host, 0) as probe:
                    first: int = probe.getsockname()[1]
            except OSError as error:
                raise UserError(f"{host}: no port is available: {error.strerror}", "use 127.0.0.1") from error
            if not {*excluded} & {*range(first, first + num)} and self.try_hold(host, first, num):
                return first
        raise UserError(f"{host}: no {num} consecutive ports are free", "end other processes that listen there")


def assign_ports(
    config: RunConfig, set_keys: Collection[str], reservation: PortReservation, recorded: RunConfig | None = None
) -> RunConfig:
    """Return the configuration with free ports for all roles on loopback addresses, which get metrics ports too.

    Args:
        config: run configuration.
        set_keys: keys that the user has set; their values are kept.
        reservation: holds the assigned ports.
        recorded: configuration with which the run was started before; its ports are used again if they are free.
    """
    chosen: dict[str, int] = {}
    fixed = {port for key, port in _ports(config).items() if key in set_keys and port}
    for key, host, num in _assignable(config, set_keys):
        before = _ports(recorded).get(key, 0) if recorded is not None else 0
        is_reusable = before and fixed.isdisjoint(range(before, before + num))
        if is_reusable and reservation.try_hold(host, before, num):
            chosen[key] = before
        else:
            chosen[key] = reservation.hold_any(host, num, fixed)
    return _with_ports(config, chosen)


def assignable_keys(config: RunConfig, set_keys: Collection[str]) -> frozenset[str]:
    """Return the keys of all ports that `assign_ports` may choose, whether or not the configured ports are free.

    Args:
        config: run configuration.
        set_keys: keys that the user has set.
    """
    return frozenset(ports.key for ports in _assignable(config, set_keys))


def _assignable(config: RunConfig, set_keys: Collection[str]) -> Iterator[_PortRange]:
    num_replicas = config.inference.num_replicas
    for section, address, listen_host, num in (
        ("replay", config.replay.address, config.replay.listen_host, 1),
        ("inference", config.inference.address, config.inference.listen_host, num_replicas),
    ):
        # A server with a listen_host is reached by other machines, which know its port from the configuration.
        is_fixed = f"{section}.address" in set_keys or listen_host is not None or not rpc.is_loopback(address.host)
        if num and not is_fixed:
            yield _PortRange(f"{section}.address", address.host, num)
    metrics_host = config.security.metrics_host
    for section, num in (("replay", 1), ("inference", num_replicas), ("actor", config.num_actors), ("learner", 1)):
        if num and f"{section}.metrics_port" not in set_keys and rpc.is_loopback(metrics_host):
            yield _PortRange(f"{section}.metrics_port", metrics_host, num)


def _ports(config: RunConfig) -> dict[str, int]:
    """Return the first port of each key that `assign_ports` can set."""
    return {
        "replay.address": config.replay.address.port,
        "inference.address": config.inference.address.port,
        "replay.metrics_port": config.replay.metrics_port,
        "inference.metrics_port": config.inference.metrics_port,
        "actor.metrics_port": config.actor.metrics_port,
        "learner.metrics_port": config.learner.metrics_port,
    }


def _with_ports(config: RunConfig, ports: dict[str, int]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for dotted_key, port in ports.items():
        section, _, key = dotted_key.partition(".")
        host = getattr(config, section).address.host if key == "address" else ""
        sections.setdefault(section, {})[key] = HostPort.of(host, port) if host else port
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to a port that no other socket is bound to."""
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        bound.bind(address[4])  # without SO_REUSEADDR, so that reserved ports are in use as well
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except BaseException:
        bound.close()
        raise
    return bound

"""Hosts of a learner of several nodes, emulated by network namespaces of this machine, each with its own address.

The hosts and this machine are connected by a bridge. A host has a name of its own, which resolves to no address, as on
many clusters.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

HERE = "198.18.46.254"
"""Address of this machine, from the range that is reserved for network benchmarks (RFC 2544)."""
_ADDRESS = "198.18.46.{}"
_DEVICE = "cluster0"


def hosts_unavailable_reason() -> str:
    """Return why no hosts can be emulated; empty if no obstacle is known."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    return "network namespaces require root" if os.geteuid() else ""


@dataclass(frozen=True)
class Host:
    """Network namespace with one device, whose other end (the cable) is at the bridge."""

    name: str
    address: str
    namespace: str
    cable: str

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a process on the host, in a process group of its own."""
        named = f'hostname {self.name} && exec "$@"'
        prefix = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh"]
        return subprocess.Popen([*prefix, *command], text=True, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]

    def kill(self) -> None:
        """Kill all processes of the host with SIGKILL."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for pid in map(int, listed.stdout.split()):
            os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Unplug the cable: packets are lost without an error."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        """Plug the cable in."""
        _ip("link", "set", self.cable, "up")


@contextmanager
def connected_hosts(num: int) -> Iterator[list[Host]]:
    """Create hosts that reach one another and this machine (`HERE`); delete them at the end of the block."""
    unique = f"dkn{os.getpid()}"
    with ExitStack() as stack:
        _ip("link", "add", unique, "type", "bridge")
        stack.callback(_ip, "link", "delete", unique)
        _ip("address", "add", f"{HERE}/24", "dev", unique)
        _ip("link", "set", unique, "up")
        hosts = []
        for index in range(num):
            host = Host(f"host-{index}", _ADDRESS.format(index + 1), f"{unique}-{index}", f"{unique}x{index}")
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
            stack.callback(host.kill)
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", _DEVICE, "netns", host.namespace)
            _ip("link", "set", host.cable, "master", unique)
            host.plug()
            for device in ("lo", _DEVICE):
                _ip("-netns", host.namespace, "link", "set", device, "up")
            _ip("-netns", host.namespace, "address", "add", f"{host.address}/24", "dev", _DEVICE)
            hosts.append(host)
        yield hosts


def _ip(*arguments: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin"
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, env={**os.environ, "PATH": path})

"""Second machine for desktops, emulated by a network namespace, and an SSH server on this side.

From the namespace only the SSH server of this machine can be reached, and through it only the ports that the line of
the key in `authorized_keys` permits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports_kit import free_port

OPEN_SCRIPT = Path(__file__).parents[2] / "deploy" / "tunnel" / "open.sh"
TUNNEL_IS_OPEN, TUNNEL_IS_DOWN = "is open", "is down"
"""Phrases by which open.sh reports the state of the tunnel."""
_HERE, _THERE = "198.18.45.1", "198.18.45.2"
"""Addresses of both ends, from the range that is reserved for network benchmarks (RFC 2544)."""


def tunnel_unavailable_reason() -> str:
    """Return why no second machine can be emulated; empty if no obstacle is known."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("ip", "ssh", "ssh-keygen", "sshd") if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, iproute2)"
    return "network namespaces require root" if os.geteuid() else ""


@dataclass(frozen=True)
class OtherMachine:
    """Network namespace, connected to this machine by a pair of virtual Ethernet devices (the cable)."""

    name: str
    cable: str

    @property
    def prefix(self) -> list[str]:
        """Command prefix that runs a command in the namespace."""
        return ["ip", "netns", "exec", self.name]

    def unplug(self) -> None:
        """Unplug the cable: packets are lost without an error."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        """Plug the cable in."""
        _ip("link", "set", self.cable, "up")


@contextmanager
def other_machine() -> Iterator[OtherMachine]:
    """Create a second machine with its cable plugged in; delete it at the end of the block."""
    machine = OtherMachine(f"deskrl-{os.getpid()}", f"dk{os.getpid()}")
    _ip("netns", "add", machine.name)
    try:
        _ip("link", "add", machine.cable, "type", "veth", "peer", "name", "cable", "netns", machine.name)
        _ip("address", "add", f"{_HERE}/30", "dev", machine.cable)
        machine.plug()
        for device in ("lo", "cable"):
            _ip("-netns", machine.name, "link", "set", device, "up")
        _ip("-netns", machine.name, "address", "add", f"{_THERE}/30", "dev", "cable")
        yield machine
    finally:
        _ip("netns", "delete", machine.name)


class Tunnel:
    """Process of `deploy/tunnel/open.sh` on the second machine, with its SSH server on this machine.

    Args:
        machine: second machine.
        config: configuration file of the run, as seen by the second machine.
        folder: folder for keys and logs.
        ports: ports of this machine that the key may forward to.
    """

    def __init__(self, machine: OtherMachine, config: Path, folder: Path, ports: Sequence[int]) -> None:
        self._log = folder / "tunnel.log"
        self._cleanup = ExitStack()
        options = self._cleanup.enter_context(_ssh_server(folder, ports))
        with open(self._log, "wb") as log:
            command = [*machine.prefix, "bash", str(OPEN_SCRIPT), str(config), f"root@{_HERE}", *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def count(self, phrase: str) -> int:
        """Return how often a phrase occurs in the log of open.sh."""
        return self._log.read_text().count(phrase)

    @property
    def ssh_pid(self) -> int:
        """Process id of the current SSH client."""
        (pid,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(pid)

    def close(self) -> int:
        """Terminate open.sh and the SSH server; return the exit status of open.sh."""
        self._process.terminate()
        status = self._process.wait()
        self._cleanup.close()
        return status


@contextmanager
def _ssh_server(folder: Path, ports: Sequence[int]) -> Iterator[list[str]]:
    """Start an SSH server for one key that may only forward to `ports`; yield the options of `ssh` for it."""
    for key in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    permitted = ",".join(["restrict", "port-forwarding", *(f'permitopen="127.0.0.1:{port}"' for port in ports)])
    (folder / "authorized_keys").write_text(f"{permitted} {(folder / 'key.pub').read_text()}")
    port = free_port()
    (folder / "known_hosts").write_text(f"[{_HERE}]:{port} {(folder / 'host.pub').read_text()}")
    settings = {
        "ListenAddress": f"{_HERE}:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no",  # the parent folder /tmp is writable by all users
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PidFile": "none",
        "ClientAliveInterval": 1,
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires this folder, which its package creates at boot
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"])
    try:
        quick = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2", "-o", "ConnectTimeout=2"]
        yield ["-p", str(port), "-i", str(folder / "key"), "-o", f"UserKnownHostsFile={folder / 'known_hosts'}", *quick]
    finally:
        server.terminate()
        server.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

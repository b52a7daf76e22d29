"""A second machine for desktops, as far as a network goes: a namespace at the end of a cable, and an SSH server here.

From there nothing of this machine is reached but that server, and by it what the key's line permits. Knows nothing of
deskrl but the program that opens the tunnel.
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

OPEN = Path(__file__).parents[2] / "deploy" / "tunnel" / "open.sh"
IS_OPEN, IS_DOWN = "is open", "is down"
"""What it says of the tunnel."""
_HERE, _THERE = "198.18.45.1", "198.18.45.2"
"""Of the addresses that are kept for tests of networks."""


def why_no_tunnel() -> str:
    """Why there can be no second machine; empty if there can, as far as a glance tells."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("ip", "ssh", "ssh-keygen", "sshd") if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, iproute2)"
    return "network namespaces need root" if os.geteuid() else ""


@dataclass(frozen=True)
class OtherMachine:
    """A network namespace and the cable to it."""

    name: str
    cable: str

    @property
    def prefix(self) -> list[str]:
        """What a command begins with to run there."""
        return ["ip", "netns", "exec", self.name]

    def pull(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.cable, "up")


@contextmanager
def other_machine() -> Iterator[OtherMachine]:
    """One, with a cable plugged in."""
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
    """`deploy/tunnel/open.sh`, run on the other machine.

    Args:
        machine: where.
        config: of the run, as that machine has it.
        folder: for keys and what is written.
        ports: of this machine that the key may reach.
    """

    def __init__(self, machine: OtherMachine, config: Path, folder: Path, ports: Sequence[int]) -> None:
        self._log = folder / "tunnel.log"
        self._ends = ExitStack()
        options = self._ends.enter_context(_ssh_server(folder, ports))
        with open(self._log, "wb") as log:
            command = [*machine.prefix, "bash", str(OPEN), str(config), f"root@{_HERE}", *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def count(self, told: str) -> int:
        """How often it has said so."""
        return self._log.read_text().count(told)

    @property
    def client(self) -> int:
        """The process of the tunnel at the moment."""
        (pid,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(pid)

    def close(self) -> int:
        """End it and the server; returns the exit status."""
        self._process.terminate()
        status = self._process.wait()
        self._ends.close()
        return status


@contextmanager
def _ssh_server(folder: Path, ports: Sequence[int]) -> Iterator[list[str]]:
    """A server for one key that may forward to these ports and nothing else; options with which `ssh` gets there."""
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
        "StrictModes": "no",  # the folder lies below /tmp
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PidFile": "none",
        "ClientAliveInterval": 1,
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # it insists on this folder, which its package makes at boot
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"])
    try:
        quick = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2", "-o", "ConnectTimeout=2"]
        yield ["-p", str(port), "-i", str(folder / "key"), "-o", f"UserKnownHostsFile={folder / 'known_hosts'}", *quick]
    finally:
        server.terminate()
        server.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

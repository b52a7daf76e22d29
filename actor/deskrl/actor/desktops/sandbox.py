"""One sandbox: a bubblewrap container that runs the guest server, started and ended. Knows no desktop operation.

The sandbox has its own user, process, mount, network, IPC and host name namespaces. What it sees of the machine is
read-only: programs, libraries, configuration, the Python that runs the guest server. Home, /tmp and /run are its own,
in memory, and gone with it. The guest server answers on a socket that this process listens on and hands over, so
nothing inside can write to anything outside.

Started by root, it runs as a user of its own, and what that user could not reach (an interpreter below /root) is first
bound to a place it can, in a mount namespace of its own. Every process of it carries the folder of its desktop on its
command line (`TAG`), by which `orphans.py` finds what is left of a run that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.limits import ControlGroups, supports_process_limit
from deskrl.actor.desktops.mounts import LIBRARY, chrome_arguments, guest_sources, python_arguments, top_level_arguments
from deskrl.core.errors import UserError

TAG = "DESKRL_DESKTOP_FOLDER"
_GUEST_UID = 61001
"""User of sandboxes that root starts: of no account, and in no range that systemd hands out."""
_INSIDE_UID = 1000
_STAGE = Path("/mnt")
_HOME_BYTES = 512 * 1024**2
_SHARED_BYTES = 256 * 1024**2
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class SandboxSpec:
    """What distinguishes one sandbox from another."""

    folder: Path
    width: int
    height: int
    memory_bytes: int
    max_processes: int
    groups: ControlGroups


class Sandbox:
    """A running sandbox; made by `Sandbox.spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], init_fd: int, log: _LogTail) -> None:
        self._process = process
        self._init_fd = init_fd
        self._log = log

    @classmethod
    async def spawn(cls, spec: SandboxSpec, listener: socket.socket) -> Sandbox:
        """Start a sandbox whose guest server answers on `listener`; returns before it does.

        The kernel ends a sandbox when the thread that started it ends, so it is the event loop's own.
        """
        info, info_write = os.pipe()
        passed = {"listener": listener.fileno(), "info": info_write}
        process = _start(spec, passed)
        os.close(info_write)
        try:
            log = _LogTail()
            await asyncio.get_running_loop().connect_read_pipe(lambda: log, process.stderr)
            status = _LogTail()
            await asyncio.get_running_loop().connect_read_pipe(lambda: status, os.fdopen(info, "rb"))
            await status.closed.wait()
            init_fd = os.pidfd_open(json.loads(status.text)["child-pid"])
        except (ValueError, ProcessLookupError) as error:
            await log.closed.wait()
            process.wait()
            raise _refusal(log.text) from error
        except asyncio.CancelledError:
            process.kill()  # what it has started by now dies with it
            process.wait()
            raise
        return cls(process, init_fd, log)

    @property
    def is_running(self) -> bool:
        """Whether it still exists."""
        return not _has_ended(self._init_fd)

    @property
    def log_tail(self) -> str:
        """The last that its programs wrote to standard error."""
        return self._log.text

    async def kill(self) -> None:
        """End every process of it, stopped ones too; returns when none is left. To be called once."""
        # The first process of a process namespace ends only after all others have: waiting for it is waiting for all.
        _send(self._init_fd, signal.SIGKILL)
        await _wait_readable(self._init_fd)
        # bubblewrap outside then ends by itself; killed, it would leave the machine's init a zombie to wait for.
        process_fd = os.pidfd_open(self._process.pid)  # ours and not waited for, so the id is still its own
        _send(process_fd, signal.SIGCONT)
        await _wait_readable(process_fd)
        self._process.wait()
        os.close(process_fd)
        os.close(self._init_fd)


class _LogTail(asyncio.Protocol):
    """Reads a pipe to its end, so that no writer ever waits for room in it, and keeps the last of it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.closed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._data += data
        del self._data[:-_TAIL_BYTES]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    @property
    def text(self) -> str:
        lines = self._data.decode("utf-8", "replace").splitlines()
        return " ".join(line.strip() for line in lines if line.strip())


def _refusal(reason: str) -> Exception:
    """Why there is no sandbox: this machine forbids them, or something that may be over the next time."""
    if any(words in reason for words in ("Permission denied", "Operation not permitted", "No permissions")):
        return UserError(
            f"this machine lets nobody make a sandbox ({reason})",
            "allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a container's seccomp "
            "and capability settings)",
        )
    return DesktopError(f"the sandbox did not start: {reason}")


def _send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def _wait_readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _start(spec: SandboxSpec, passed: dict[str, int]) -> subprocess.Popen[bytes]:
    with _identity_files(passed):
        return subprocess.Popen(
            _command(spec, passed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(passed.values()),
            # Its init keeps what it is started with, for every process inside to read: none of the actor's secrets.
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


@contextlib.contextmanager
def _identity_files(passed: dict[str, int]) -> Iterator[None]:
    """Files that name the sandbox's one user, as descriptors that bubblewrap copies from."""
    ids = f"{_INSIDE_UID}:{_INSIDE_UID}"
    contents = {
        "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:{ids}:user:/home/user:/bin/bash\n",
        "group": f"root:x:0:\nuser:x:{_INSIDE_UID}:\n",
    }
    for name, text in contents.items():
        passed[name] = os.memfd_create(name)
        os.write(passed[name], text.encode())
        os.lseek(passed[name], 0, os.SEEK_SET)
    try:
        yield
    finally:
        for name in contents:
            os.close(passed[name])


def _command(spec: SandboxSpec, passed: dict[str, int]) -> list[str]:
    """The whole command line: join the control groups, stage, drop to the guest's user, bubblewrap, guest server."""
    as_root = os.geteuid() == 0
    sources = guest_sources()
    script = [f"echo $$ > {shlex.quote(str(file))}" for file in spec.groups.membership_files]
    command = ["sh", "-c"]
    if as_root:
        command = ["unshare", "--mount", *command]
        script.append(f"mount -t tmpfs -o size=1M,mode=755 deskrl {_STAGE}")
        for number, source in enumerate(sources):
            place = _STAGE / str(number)
            make = "mkdir" if source.is_dir() else "touch"
            script += [f"{make} {place}", f"mount --bind {shlex.quote(str(source))} {place}"]
    staged = [
        (str(_STAGE / str(number)) if as_root else str(source), str(destination))
        for number, (source, destination) in enumerate(sources.items())
    ]
    drop = ["setpriv", f"--reuid={_GUEST_UID}", f"--regid={_GUEST_UID}", "--clear-groups"] if as_root else []
    return [
        *command,
        " && ".join([*script, 'exec "$@"']),
        "deskrl-desktop",
        *drop,
        *_bubblewrap(spec, passed, staged),
        *_guest(spec, passed["listener"]),
    ]


def _bubblewrap(spec: SandboxSpec, passed: dict[str, int], staged: list[tuple[str, str]]) -> list[str]:
    home, shared = str(_HOME_BYTES), str(_SHARED_BYTES)
    arguments = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    arguments += ["--uid", str(_INSIDE_UID), "--gid", str(_INSIDE_UID), "--hostname", "desktop"]
    arguments += ["--ro-bind", "/usr", "/usr", *top_level_arguments(), "--ro-bind", "/etc", "/etc"]
    for optional in ("/opt/google", "/var/cache/fontconfig", "/var/lib/dbus"):
        arguments += ["--ro-bind-try", optional, optional]
    arguments += ["--ro-bind-data", str(passed["passwd"]), "/etc/passwd"]
    arguments += ["--ro-bind-data", str(passed["group"]), "/etc/group"]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--size", shared, "--tmpfs", "/dev/shm"]
    arguments += ["--size", home, "--tmpfs", "/tmp", "--size", shared, "--tmpfs", "/run"]
    arguments += ["--size", home, "--perms", "0755", "--tmpfs", "/home/user", "--chdir", "/home/user"]
    for source, destination in staged:
        arguments += ["--ro-bind", source, destination]
    arguments += [*chrome_arguments(), *python_arguments()]
    arguments += ["--clearenv", "--setenv", TAG, str(spec.folder), "--setenv", "PYTHONPATH", str(LIBRARY)]
    return [*arguments, "--setenv", "PATH", "/usr/bin:/bin", "--info-fd", str(passed["info"]), "--"]


def _guest(spec: SandboxSpec, listener: int) -> list[str]:
    limits_processes = spec.groups.limits_processes or not supports_process_limit()
    options = {
        "listener": listener,
        "width": spec.width,
        "height": spec.height,
        "max_processes": None if limits_processes else spec.max_processes,
        "max_data_bytes": None if spec.groups.limits_memory else spec.memory_bytes,
    }
    interpreter = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    return [interpreter, "-S", "-s", "-B", "-m", "deskrl.actor.guest.server", json.dumps(options)]

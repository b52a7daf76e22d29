"""Sandbox of one desktop: starts and kills a bubblewrap container that runs the guest server.

The sandbox has its own user, process, mount, network, IPC and host name namespaces. It sees programs, libraries,
configuration and the interpreter of the guest server read-only. Home, /tmp and /run are in memory and are removed with
the sandbox. The guest server responds on a listening socket that it inherits from this process, so that nothing inside
the sandbox can write to anything outside. The guest server starts a second sandbox inside this one for the programs of
the desktop (`guest/session_sandbox.py`), so that they cannot reach it.

Where this process may give users away (`kernel_users`), the sandbox runs as a separate user of this desktop. Files
which that user cannot reach, such as an interpreter below /root, are first bind-mounted to an accessible folder in a
separate mount namespace. bubblewrap has the folder of its desktop on its command line (`FOLDER_VARIABLE`), by which
`orphan_cleanup` finds the sandboxes of a killed actor.
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

from deskrl.actor import guest
from deskrl.actor.desktops.account_files import account_files
from deskrl.actor.desktops.base import DesktopError
from deskrl.actor.desktops.cgroups import ControlGroups, supports_process_limit
from deskrl.actor.desktops.kernel_users import KernelUser
from deskrl.actor.desktops.mounts import (
    GUEST_LIBRARY,
    chrome_arguments,
    guest_sources,
    python_arguments,
    top_level_arguments,
)
from deskrl.actor.desktops.sandbox_diagnosis import diagnose, namespace_hint, read_settings
from deskrl.actor.guest.limits import X_MEMORY_FRACTION
from deskrl.actor.guest.session_sandbox import SESSION_FOLDER
from deskrl.core.errors import UserError

FOLDER_VARIABLE = "DESKRL_DESKTOP_FOLDER"
"""Environment variable that marks the processes of a sandbox; its value is the folder of the desktop."""

_INSIDE_UID = 1000
_STAGE_FOLDER = Path("/mnt")
_HOME_BYTES = 512 * 1024**2
_SHARED_BYTES = 256 * 1024**2
_SESSION_FOLDERS = (
    ("home", _HOME_BYTES, "0755"),
    ("tmp", _HOME_BYTES, "1777"),
    ("shm", _SHARED_BYTES, "1777"),
    ("run", _SHARED_BYTES, "0700"),
)
"""Writable folders of the programs of the desktop: name, size and mode. They outlive the inner sandbox."""
_LOG_TAIL_BYTES = 4096
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class SandboxSpec:
    """Parameters of one sandbox."""

    folder: Path
    width: int
    height: int
    memory_bytes: int
    max_processes: int
    max_file_bytes: int
    groups: ControlGroups
    user: KernelUser | None
    """User of the sandbox; None: the user of this process."""


class Sandbox:
    """Running sandbox, created by `Sandbox.spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], init_fd: int, log: _LogTail) -> None:
        self._process = process
        self._init_fd = init_fd
        self._log = log

    @classmethod
    async def spawn(cls, spec: SandboxSpec, listener: socket.socket) -> Sandbox:
        """Start a sandbox whose guest server will accept connections on `listener`; does not wait until it does.

        The kernel kills the sandbox when the thread that started it ends. It is therefore started in the event loop's
        thread.

        Args:
            spec: parameters of the sandbox.
            listener: listening Unix socket; the caller may close it afterwards.

        Raises:
            UserError: this machine does not permit sandboxes.
            DesktopError: the sandbox did not start.
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
            raise _start_error(log.text) from error
        except asyncio.CancelledError:
            process.kill()  # its child processes are killed with it
            process.wait()
            raise
        return cls(process, init_fd, log)

    @property
    def is_running(self) -> bool:
        """Whether the sandbox still exists."""
        return not _has_ended(self._init_fd)

    async def has_ended_within(self, timeout_s: float) -> bool:
        """Wait for the end of the sandbox for at most `timeout_s`; return whether it has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await _wait_readable(self._init_fd)
        return not self.is_running

    async def end_signal(self) -> signal.Signals | None:
        """Return the signal that ended the guest server or the sandbox; None if they exited by themselves."""
        await asyncio.to_thread(self._process.wait, _END_TIMEOUT_S)
        # bubblewrap exits with 128 + the number of the signal that ended its command.
        status = self._process.returncode
        number = -status if status < 0 else status - 128
        return signal.Signals(number) if number in {*signal.Signals} else None

    @property
    def log_tail(self) -> str:
        """End of the standard error output of all programs in the sandbox."""
        return self._log.text

    async def kill(self) -> None:
        """Kill all processes of the sandbox and wait until none is left. May be called only once."""
        # The first process of a process namespace ends after all others, so waiting for it is sufficient.
        _send(self._init_fd, signal.SIGKILL)
        await _wait_readable(self._init_fd)
        # The outer bubblewrap process then ends on its own. If killed, it would leave a zombie to the machine's init.
        if self._process.returncode is None:  # not yet waited for, so the id cannot have been reused
            process_fd = os.pidfd_open(self._process.pid)
            _send(process_fd, signal.SIGCONT)
            await _wait_readable(process_fd)
            self._process.wait()
            os.close(process_fd)
        os.close(self._init_fd)


class _LogTail(asyncio.Protocol):
    """Reads a pipe continuously, so that writers never block, and keeps the end of the data."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.closed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._data += data
        del self._data[:-_LOG_TAIL_BYTES]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    @property
    def text(self) -> str:
        lines = self._data.decode("utf-8", "replace").splitlines()
        return " ".join(line.strip() for line in lines if line.strip())


def _start_error(reason: str) -> Exception:
    """Return UserError if this machine cannot start sandboxes, else DesktopError for a possibly transient failure."""
    return diagnose(reason, read_settings()) or DesktopError(f"the sandbox did not start: {reason}")


def guest_start_error(reason: str) -> Exception:
    """Return the error for a guest server that ended while it started, from its standard error output."""
    if "inner sandbox" in reason:
        return UserError(
            f"this machine does not permit a sandbox inside a sandbox, which keeps the policy from the guest server "
            f"({reason})",
            namespace_hint(read_settings()),
        )
    return DesktopError(f"the desktop did not start: {reason}")


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
    with _identity_files(passed), contextlib.ExitStack() as opened:
        for number, file in enumerate(spec.groups.session_files):
            passed[f"session_group{number}"] = opened.enter_context(open(file, "wb", buffering=0)).fileno()
        return subprocess.Popen(
            _command(spec, passed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(passed.values()),
            # The sandbox can read the environment of its init process: it must not contain the actor's secrets.
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


@contextlib.contextmanager
def _identity_files(passed: dict[str, int]) -> Iterator[None]:
    """Add descriptors of passwd and group files for the sandbox's only user to `passed`, and close them at exit."""
    contents = account_files(_INSIDE_UID)
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
    """Return the command line that joins the groups, stages mounts, drops privileges and runs bubblewrap."""
    sources = guest_sources()
    script = [f"echo $$ > {shlex.quote(str(file))}" for file in spec.groups.membership_files]
    places = {source: str(source) for source in sources}
    if spec.user is not None:
        places = {source: str(_STAGE_FOLDER / str(number)) for number, source in enumerate(sources)}
        script.append(f"mount -t tmpfs -o size=1M,mode=755 deskrl {_STAGE_FOLDER}")
        for make, are_folders in (("mkdir", True), ("touch", False)):
            if made := [places[source] for source in sources if source.is_dir() == are_folders]:
                script.append(shlex.join([make, *made]))
        script += [f"mount --bind {shlex.quote(str(source))} {place}" for source, place in places.items()]
    staged = [(places[source], str(destination)) for source, destination in sources.items()]
    program = [*_bubblewrap_arguments(spec, passed, staged), *_guest_command(spec, passed)]
    if spec.user is not None:
        return spec.user.command(script, program)
    return ["sh", "-c", " && ".join([*script, 'exec "$@"']), "deskrl-desktop", *program]


def _bubblewrap_arguments(spec: SandboxSpec, passed: dict[str, int], staged: list[tuple[str, str]]) -> list[str]:
    # User namespaces stay allowed: the guest server creates the inner sandbox, in which they are not.
    arguments = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    arguments += ["--uid", str(_INSIDE_UID), "--gid", str(_INSIDE_UID), "--hostname", "desktop"]
    arguments += ["--ro-bind", "/usr", "/usr", *top_level_arguments(), "--ro-bind", "/etc", "/etc"]
    for optional in ("/opt/google", "/var/cache/fontconfig", "/var/lib/dbus"):
        arguments += ["--ro-bind-try", optional, optional]
    arguments += ["--ro-bind-data", str(passed["passwd"]), "/etc/passwd"]
    arguments += ["--ro-bind-data", str(passed["group"]), "/etc/group"]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/"]
    for folder, size in (("/dev/shm", _SHARED_BYTES), ("/tmp", _HOME_BYTES), ("/run", _SHARED_BYTES)):
        arguments += ["--size", str(size), "--tmpfs", folder]
    for name, size, mode in _SESSION_FOLDERS:
        arguments += ["--size", str(size), "--perms", mode, "--tmpfs", str(SESSION_FOLDER / name)]
    for source, destination in staged:
        arguments += ["--ro-bind", source, destination]
    arguments += [*chrome_arguments(), *python_arguments()]
    arguments += ["--clearenv", "--setenv", FOLDER_VARIABLE, str(spec.folder)]
    arguments += ["--setenv", "PYTHONPATH", str(GUEST_LIBRARY)]
    return [*arguments, "--setenv", "PATH", "/usr/bin:/bin", "--info-fd", str(passed["info"]), "--"]


def _guest_command(spec: SandboxSpec, passed: dict[str, int]) -> list[str]:
    limits_processes = spec.groups.limits_processes or not supports_process_limit()
    options = {
        "listener": passed["listener"],
        "width": spec.width,
        "height": spec.height,
        "max_processes": None if limits_processes else spec.max_processes,
        "max_data_bytes": None if spec.groups.limits_memory else spec.memory_bytes,
        "max_x_data_bytes": spec.memory_bytes // X_MEMORY_FRACTION,
        "max_file_bytes": spec.max_file_bytes,
        "group_fds": [descriptor for name, descriptor in passed.items() if name.startswith("session_group")],
    }
    interpreter = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    return [interpreter, "-S", "-s", "-B", "-m", guest.__name__, json.dumps(options)]

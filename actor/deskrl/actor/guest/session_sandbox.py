"""Boundary between the guest server and the session: where the policy's programs run, and how they are ended.

The guest server judges what the policy does: it takes screenshots, sends input, runs evaluator commands and answers the
actor. Two boundaries keep the session away from it:

- `NestedSandbox`: the session runs in a bubblewrap sandbox inside the guest server's own sandbox. Processes of the
  guest server are invisible there, and belong to a parent user namespace.
- `SeparateUser`: the session runs as another user without capabilities, for containers in which no user namespace can
  be created. The guest server is root with the capabilities to change users and to end processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from deskrl.actor.guest.credentials import signal_user
from deskrl.actor.guest.processes import SessionProcesses, list_all_pids, read_process
from deskrl.actor.guest.spawner import Entry, ProgramLimits
from deskrl.actor.guest.watchdog import Part

HOME = "/home/user"
"""Home folder, as seen in the session."""
RUNTIME = "/run/user/1000"
"""XDG_RUNTIME_DIR, as seen in the session."""
FRAMEBUFFER_FOLDER = Path("/run/framebuffer")
X_SOCKETS = Path("/tmp/.X11-unix")
SESSION_FOLDER = Path("/session")
"""Folder of the guest server's sandbox that holds the session's writable folders: home, tmp, shm and run."""

X_SERVER, SESSION = "the X server", "the session"
"""Names of parts."""

_PRCTL = {"x86_64": 157, "aarch64": 167}
_INIT_PROGRAM = """
syscall(PRCTL, 4, 0, 0, 0, 0) == 0 or die;
$SIG{CHLD} = "IGNORE";
$| = 1;
print "session\\n";
open(STDOUT, ">", "/dev/null");
open(STDERR, ">", "/dev/null");
while (1) { my $n = sysread(STDIN, my $data, 1); exit if defined $n && $n == 0; }
"""
"""Perl program that runs as first process of the session. It makes its memory private (PR_SET_DUMPABLE), lets the
kernel reap orphans, and ends when the guest server does. As first process it ignores signals from inside. It starts no
processes, which could fail at the process limit. Perl is part of every Debian system and starts within milliseconds."""
_HIDDEN = frozenset({"dev", "home", "mnt", "proc", "root", "run", "session", "sys", "tmp"})
_USER_ID = "1000"
_RUN_BYTES = 16 * 1024**2
_END_TIMEOUT_S = 10.0
_POLL_S = 0.002


class BoxError(RuntimeError):
    """The boundary of the session cannot be made on this machine."""


class SessionBox(SessionProcesses):
    """Boundary of one session."""

    root_fd: int
    """Descriptor of the root folder of the session."""
    file_user_id: int | None
    """User whose permissions apply to files of the session, and of its processes; None: the guest server's own."""
    has_room_inside: bool
    """Whether commands after the end of the session are started in the same way as programs of the session."""

    @abstractmethod
    def start(self, x_server: Sequence[str], x_limits: ProgramLimits) -> None:
        """Start the X server and the first process of the session.

        Args:
            x_server: command line of the X server, which reports on its standard output when it is ready.
            x_limits: limits of the X server.
        """

    @abstractmethod
    def wait_until_ready(self, limits: ProgramLimits) -> Entry:
        """Wait for the X server and the first process of the session.

        Args:
            limits: limits of programs in the session.

        Returns:
            How the spawner starts programs in the session.

        Raises:
            BoxError: the session's sandbox cannot be created, or the X server exited.
        """

    @abstractmethod
    def pid_of_x_client(self, x_pid: int) -> int | None:
        """Translate a process id that the X server reports; None if it is not a process of the session."""

    @abstractmethod
    def end(self) -> None:
        """Kill all processes of the session and wait until none is left; raises TimeoutError."""

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """Return the parts that must not end by themselves; `SESSION` is the one that `end` ends."""

    @abstractmethod
    def room_command(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command in a fresh sandbox over the session's files."""


class NestedSandbox(SessionBox):
    """Session in a bubblewrap sandbox inside the guest server's sandbox.

    The X server runs in a sandbox between both: it sees the processes of the session, which lets it attribute windows
    to them, and none of the guest server's.

    Args:
        group_fds: open `cgroup.procs` files of the session's control groups.
    """

    file_user_id = None
    has_room_inside = False

    def __init__(self, group_fds: tuple[int, ...]) -> None:
        self._group_fds = group_fds
        self._init_pidfd = -1
        self._namespace = ""
        X_SOCKETS.mkdir(mode=0o1777, exist_ok=True)
        FRAMEBUFFER_FOLDER.mkdir(parents=True, exist_ok=True)

    def start(self, x_server: Sequence[str], x_limits: ProgramLimits) -> None:
        """Start both sandboxes."""
        outer = ["bwrap", "--unshare-user", "--unshare-pid", "--die-with-parent", "--as-pid-1", "--ro-bind", "/", "/"]
        outer += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for folder in (SESSION_FOLDER, X_SOCKETS, FRAMEBUFFER_FOLDER):
            outer += ["--bind", str(folder), str(folder)]
        init = ["/usr/bin/perl", "-e", _INIT_PROGRAM.replace("PRCTL", str(_PRCTL[os.uname().machine]))]
        links = ["--ro-bind", str(X_SOCKETS), str(X_SOCKETS), "--bind", str(SESSION_FOLDER / "run"), RUNTIME]
        inner = [*_session_arguments(links), "--as-pid-1", "--", *init]
        data = x_limits.max_data_bytes
        script = [
            "exec 3<&0",
            f"{shlex.join(inner)} <&3 3<&- &",
            f"ulimit -d {data // 1024}" if data is not None else ":",
            f"exec {shlex.join(x_server)} </dev/null 3<&-",
        ]
        self._x_process = subprocess.Popen(
            [*outer, "--", "/bin/sh", "-c", "\n".join(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def wait_until_ready(self, limits: ProgramLimits) -> Entry:
        """Wait for both, and find the first process of the session."""
        assert self._x_process.stdout is not None
        lines = [self._x_process.stdout.readline() for _ in range(2)]
        if b"session\n" not in lines or b"" in lines:
            self._x_process.kill()
            part = "the X server" if b"session\n" in lines else "the inner sandbox of the session"
            raise BoxError(f"{part} did not start")
        (init,) = [pid for pid in list_all_pids() if _namespace_pids(pid)[-1:] == [1] and len(_namespace_pids(pid)) > 2]
        self._init_pidfd = os.pidfd_open(init)
        self._namespace = os.readlink(f"/proc/{init}/ns/pid")
        self._init_pid = init
        monitor = read_process(init)
        self._monitor_pid = monitor.parent_pid if monitor is not None else 0
        self.root_fd = os.open(f"/proc/{init}/root", os.O_PATH | os.O_DIRECTORY)
        self._mount_namespace = open(f"/proc/{init}/ns/mnt", "rb")  # noqa: SIM115 - keeps the mounts after the end
        return Entry(self._init_pidfd, None, limits, self._group_fds)

    def is_member(self, pid: int) -> bool:
        """Return whether a process is in the inner process namespace and not its first one."""
        with contextlib.suppress(OSError):
            return pid != self._init_pid and os.readlink(f"/proc/{pid}/ns/pid") == self._namespace
        return False

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes in the guest server's sandbox except the guest server."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, number)

    def is_signalled(self, pid: int) -> bool:
        """Return whether a process is not the guest server."""
        return pid != os.getpid()

    def pid_of_x_client(self, x_pid: int) -> int | None:
        """Translate an id of the X server's namespace, which is the parent of the session's."""
        members = filter(self.is_member, list_all_pids())
        return next((pid for pid in members if _namespace_pids(pid)[-2:-1] == [x_pid]), None)

    def end(self) -> None:
        """Kill the first process of the session; the kernel ends all others with it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._init_pidfd, select.POLLIN)
        if not poll.poll(1000 * _END_TIMEOUT_S):
            raise TimeoutError("the processes of the session did not end")

    def parts(self) -> dict[str, Part]:
        """Return the X server and the first process of the session."""
        return {
            X_SERVER: _part_of(self._x_process),
            SESSION: Part(self._init_pidfd, lambda: _status_of_zombie(self._monitor_pid)),
        }

    def room_command(self, command: Sequence[str]) -> list[str]:
        """Return a bubblewrap command line without network and windows."""
        arguments = _session_arguments(["--unshare-net", "--unshare-ipc", "--chdir", HOME])
        # bubblewrap has one exit status for all failures; the shell has the usual 126 and 127.
        return [*arguments, "--", "/bin/sh", "-c", 'exec "$@"', "sh", *command]


class SeparateUser(SessionBox):
    """Session of another user beside the guest server, which is root with CAP_SETUID, CAP_SETGID and CAP_KILL.

    Args:
        user_id: user and group of the session; no other process in this process namespace may have it.
    """

    has_room_inside = True

    def __init__(self, user_id: int) -> None:
        self._user_id = self.file_user_id = user_id
        self.root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
        X_SOCKETS.mkdir(exist_ok=True)
        X_SOCKETS.chmod(0o1777)  # as the X server expects; others cannot replace a socket in it
        FRAMEBUFFER_FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)

    def start(self, x_server: Sequence[str], x_limits: ProgramLimits) -> None:
        """Start the X server; the session needs no first process."""
        self._x_process = subprocess.Popen(
            x_server,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=x_limits.apply,
            start_new_session=True,
        )

    def wait_until_ready(self, limits: ProgramLimits) -> Entry:
        """Wait for the X server."""
        assert self._x_process.stdout is not None
        if not self._x_process.stdout.readline():
            raise BoxError("the X server did not start")
        return Entry(None, self._user_id, limits)

    def is_member(self, pid: int) -> bool:
        """Return whether a process belongs to the session's user."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            fields = file.read(4096).partition(b"\nUid:")[2].split(maxsplit=1)
            return bool(fields) and int(fields[0]) == self._user_id
        return False

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the session's user."""
        signal_user(self._user_id, number)

    def is_signalled(self, pid: int) -> bool:
        """Return whether a process belongs to the session's user."""
        return self.is_member(pid)

    def pid_of_x_client(self, x_pid: int) -> int | None:
        """Return the id unchanged if it is a process of the session."""
        return x_pid if self.is_member(x_pid) else None

    def end(self) -> None:
        """Kill the processes of the session's user until none is left."""
        self.kill_all(_END_TIMEOUT_S)

    def parts(self) -> dict[str, Part]:
        """Return the X server."""
        return {X_SERVER: _part_of(self._x_process)}

    def room_command(self, command: Sequence[str]) -> list[str]:
        """Return the command itself: after `end`, nothing else runs as the session's user."""
        return list(command)


def _session_arguments(extra: Sequence[str]) -> list[str]:
    """Return the bubblewrap command line of a sandbox over the session's files."""
    arguments = ["bwrap", "--unshare-user", "--unshare-pid", "--disable-userns", "--die-with-parent", "--new-session"]
    arguments += ["--uid", _USER_ID, "--gid", _USER_ID]
    for entry in sorted(Path("/").iterdir()):
        if entry.is_symlink():
            arguments += ["--symlink", os.readlink(entry), str(entry)]
        elif entry.name not in _HIDDEN and entry.is_dir():
            arguments += ["--ro-bind", str(entry), str(entry)]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--bind", str(SESSION_FOLDER / "shm"), "/dev/shm"]
    arguments += ["--bind", str(SESSION_FOLDER / "tmp"), "/tmp"]
    arguments += ["--size", str(_RUN_BYTES), "--tmpfs", "/run", "--bind", str(SESSION_FOLDER / "home"), HOME]
    return [*arguments, *extra, "--remount-ro", "/dev", "--remount-ro", "/"]


def _part_of(process: subprocess.Popen[bytes]) -> Part:
    """Return a part whose command is run by bubblewrap or directly."""
    return Part(os.pidfd_open(process.pid), lambda: _as_signal(process.wait()))


def _as_signal(status: int) -> int:
    """Return the exit status of the command that bubblewrap ran: it adds 128 to the number of a signal."""
    return 128 - status if 128 < status < 192 else status


def _status_of_zombie(pid: int) -> int:
    """Return the exit status of the bubblewrap process that waits for a sandbox; its parent never waits for it."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                fields = file.read(4096).rpartition(b") ")[2].split()
            if fields[0] == b"Z":
                return _as_signal(os.waitstatus_to_exitcode(int(fields[49])))
            time.sleep(_POLL_S)
    return 1


def _namespace_pids(pid: int) -> list[int]:
    """Return the ids of a process in the guest server's process namespace and its descendants, outermost first."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            line = file.read(4096).partition(b"\nNSpid:")[2].partition(b"\n")[0]
    except OSError:
        return []
    return [int(word) for word in line.split()]

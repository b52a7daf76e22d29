"""Spawner: a small process that starts programs inside the session and reports how they end.

The guest server has threads, and a process with threads can neither enter a user namespace nor fork safely. It
therefore forks this single-threaded process before it starts its threads, and sends it one request per program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deskrl.actor.guest.landlock import enter_new_domain
from deskrl.actor.guest.watchdog import Part

_MAX_REQUEST_BYTES = 4 * 1024**2
_MAX_DESCRIPTOR = 65536
_MAX_GROUPS = 16
_EXEC_TIMEOUT_S = 5.0
"""Time for a program to be executed; programs of the session may suspend it before."""
_ENTERED_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000  # CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWPID
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_REPARENTED_POLL_S = 0.0002
_OOM_SCORE = "1000"
_PER_USER_LIMITS = (resource.RLIMIT_SIGPENDING, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE)
_NUM_QUOTAS = 8
"""Programs get this fraction of what the kernel counts per user, as desktops may have the same user or owner."""
_NUM_FILES = 4096
"""Descriptors of a program, which it may raise to the hard limit; some programs try to close as many at their start."""
_libc = ctypes.CDLL(None, use_errno=True)


class ProgramLimits(NamedTuple):
    """Resource limits of programs; None if a control group enforces the limit."""

    max_processes: int | None
    max_data_bytes: int | None

    def apply(self) -> None:
        """Apply the limits to this process and its future children."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The kernel compares the descriptors in transit of a user with the limit of the process that sends one: the
        # guest server, whose limit is higher, can send some even if programs have as many in transit as they may.
        num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(num_files, _NUM_FILES), num_files))
        for limit in _PER_USER_LIMITS:
            maximum = resource.getrlimit(limit)[1]
            if maximum != resource.RLIM_INFINITY:
                resource.setrlimit(limit, (maximum // _NUM_QUOTAS,) * 2)
        if self.max_processes is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (self.max_processes,) * 2)
        if self.max_data_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.max_data_bytes,) * 2)


class Entry(NamedTuple):
    """How a program gets into the session: by the namespaces of a process, or as another user."""

    init_pidfd: int | None
    """Descriptor of the process whose user, mount and process namespaces are entered; None: stay in the own ones."""
    user_id: int | None
    """User and group of the program; None: those of the namespace."""
    limits: ProgramLimits
    group_fds: tuple[int, ...] = ()
    """Open `cgroup.procs` files of the control groups that the program joins."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors that the spawner process needs."""
        return self.group_fds if self.init_pidfd is None else (*self.group_fds, self.init_pidfd)


class SpawnedProgram:
    """Running program, as seen by the guest server."""

    def __init__(self, pid: int, status_fd: int) -> None:
        self.pid = pid
        """Process id in the guest server's process namespace."""
        self._status_fd = status_fd

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the exit status, negative for a signal; raises TimeoutError after `timeout_s`."""
        poll = select.poll()
        poll.register(self._status_fd, select.POLLIN)
        if not poll.poll(None if timeout_s is None else 1000 * timeout_s):
            raise TimeoutError
        text = os.read(self._status_fd, 64)
        self.forget()
        return int(text) if text else -signal.SIGKILL

    def kill(self) -> None:
        """Kill the process group of the program. It must not have been waited for."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def forget(self) -> None:
        """Release the descriptor; the program runs on."""
        os.close(self._status_fd)


class Spawner:
    """Client of the spawner process, used by the guest server. Thread-safe.

    The process is a copy of this one, so that this object should be created while this process is small.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, remote):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _close_all_except({0, 1, 2, remote.fileno()})
                _Server(remote).serve()
            finally:
                os._exit(1)
        remote.close()

    def set_entry(self, entry: Entry) -> None:
        """Tell the spawner how programs get into the session; must be called once, before `spawn`."""
        text = json.dumps({"has_init": entry.init_pidfd is not None, "user": entry.user_id, **entry.limits._asdict()})
        socket.send_fds(self._socket, [text.encode()], entry.descriptors)

    def part(self) -> Part:
        """Return the spawner process as a part of the desktop."""
        return Part(os.pidfd_open(self.pid), lambda: os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))

    def spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: str,
        output: tuple[int, int] | None = None,
        in_session: bool = True,
    ) -> SpawnedProgram:
        """Start a program.

        Args:
            command: program, searched in the PATH of `environment`, and its arguments.
            environment: its whole environment.
            folder: its working folder.
            output: descriptors of its standard output and error; None: /dev/null.
            in_session: start it inside the session; False: beside the guest server, with the limits of the session.

        Raises:
            OSError: the program cannot be executed; FileNotFoundError if it does not exist.
        """
        status, status_write = os.pipe()
        request = _Request(list(command), dict(environment), folder, in_session)
        null = os.open(os.devnull, os.O_RDWR) if output is None else -1
        descriptors = [status_write, *(output or (null, null))]
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(request._asdict()).encode()], descriptors)
                reply = json.loads(self._socket.recv(4096) or b'{"error": 32}')
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_write)
            if null >= 0:
                os.close(null)
        if reply.get("error"):
            os.close(status)
            raise OSError(reply["error"], f"{os.strerror(reply['error'])}: {command[0]!r}")
        return SpawnedProgram(reply["pid"], status)


class _Request(NamedTuple):
    command: list[str]
    environment: dict[str, str]
    folder: str
    in_session: bool


class _Server:
    """Loop of the spawner process."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._status_fds: dict[int, int] = {}
        # Programs whose parent, the process that entered the session, has ended become children of this process.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def serve(self) -> None:
        """Serve requests until the guest server ends."""
        text, descriptors, _, _ = socket.recv_fds(self._requests, _MAX_REQUEST_BYTES, _MAX_GROUPS + 1)
        if not text:
            return
        self._entry = _parse_entry(json.loads(text), descriptors)
        wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._requests.fileno(), wake], [], [])
            if wake in readable:
                os.read(wake, 4096)
                self._reap()
            if self._requests.fileno() in readable:
                data, descriptors, _, _ = socket.recv_fds(self._requests, _MAX_REQUEST_BYTES, 3)
                if not data:
                    return
                self._requests.send(json.dumps(self._start(_Request(**json.loads(data)), *descriptors)).encode())

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (descriptor := self._status_fds.pop(pid, None)) is not None:
                with contextlib.suppress(OSError):
                    os.write(descriptor, str(os.waitstatus_to_exitcode(status)).encode())
                os.close(descriptor)

    def _start(self, request: _Request, status_fd: int, *output: int) -> dict[str, int]:
        """Start a program; return its process id, or the error number."""
        report, report_write = os.pipe()
        try:
            helper = os.fork()
        except OSError as error:
            helper, reply = 0, {"error": error.errno or errno.EAGAIN}
            os.close(report_write)
        else:
            if helper == 0:
                try:
                    _enter_and_execute(request, self._entry, report_write, output)
                finally:
                    os._exit(1)
            os.close(report_write)
            reply = _read_report(report, helper)
        os.close(report)
        for descriptor in output:
            os.close(descriptor)
        if "pid" in reply and "error" not in reply:
            self._status_fds[reply["pid"]] = status_fd
        else:
            os.close(status_fd)
        return reply


def _parse_entry(record: dict[str, Any], descriptors: list[int]) -> Entry:
    init_pidfd = descriptors.pop() if record["has_init"] else None
    limits = ProgramLimits(record["max_processes"], record["max_data_bytes"])
    return Entry(init_pidfd, record["user"], limits, tuple(descriptors))


def _read_report(report: int, helper: int) -> dict[str, int]:
    """Return the process id of the program and, if it was not executed, the error number."""
    values: dict[str, int] = {}
    text = b""
    poll = select.poll()
    poll.register(report, select.POLLIN)
    while poll.poll(1000 * _EXEC_TIMEOUT_S):
        data = os.read(report, 256)
        if not data:
            break
        text += data
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)
        values["error"] = errno.EAGAIN
    for line in text.decode().splitlines():
        name, _, value = line.partition(" ")
        values[name] = int(value)
    if "error" in values and "pid" in values:
        with contextlib.suppress(ProcessLookupError):
            os.kill(values["pid"], signal.SIGKILL)
    return values if values else {"error": errno.EAGAIN}


def _enter_and_execute(request: _Request, entry: Entry, report: int, output: Sequence[int]) -> None:
    """Enter the session, fork there, and execute the program in the child process. Does not return.

    `report` gets the process id of the program, and `error` if it cannot be executed; it is closed by the execution.
    """
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(_OOM_SCORE)
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # processes of the session could otherwise open the copy's memory
        if request.in_session and entry.init_pidfd is not None:
            _check(_libc.setns(entry.init_pidfd, _ENTERED_NAMESPACES))
        helper = os.getpid()
        pid = os.fork()
        if pid:
            os.write(report, f"pid {pid}\n".encode())
            os._exit(0)
        while os.getppid() == helper:  # bubblewrap with --die-with-parent would end together with the helper
            time.sleep(_REPARENTED_POLL_S)
        # Commands after the end of the session do not join its groups: files of the session may fill their memory.
        for group_fd in entry.group_fds if request.in_session else ():
            with contextlib.suppress(OSError):  # kernels before 5.16 check the writer instead of the opener
                os.write(group_fd, b"0")
        entry.limits.apply()
        if entry.user_id is not None:
            os.setgroups([])
            os.setresgid(*[entry.user_id] * 3)
            os.setresuid(*[entry.user_id] * 3)
        if request.in_session:  # commands after the end of the session run alone, in a sandbox that has to mount files
            enter_new_domain()
        _execute(request, report, output)
    except OSError as error:
        os.write(report, f"error {error.errno or errno.EIO}\n".encode())
    os._exit(127)


def _execute(request: _Request, report: int, output: Sequence[int]) -> None:
    """Replace this process by the program; raises OSError."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((null, *output)):
        os.dup2(source, target)
    if report != 3:
        os.dup2(report, 3, inheritable=False)
    os.closerange(4, _MAX_DESCRIPTOR)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # the policy may have removed the folder
        os.chdir("/")
        os.chdir(request.folder)
    try:
        os.execvpe(request.command[0], request.command, request.environment)
    except OSError as error:
        os.write(3, f"error {error.errno or errno.EIO}\n".encode())
        os._exit(127)


def _close_all_except(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

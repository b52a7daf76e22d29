"""Process of one role in a job under fault injection, started as by a deployment script and restarted when it exits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deskrl.core.process_lifecycle import STOPPED_STATUS
from deskrl.launch.supervisor import USER_ERROR_STATUS

_STOP_S = 60.0
_NO_OUTPUT = "no output"
"""Last line of a process that has not written anything."""


@dataclass(frozen=True)
class UnexpectedExit:
    """Exit of a role's process that no fault explains."""

    role: str
    status: int
    last_line: str

    def __str__(self) -> str:
        return f"{self.role} exited unexpectedly with status {self.status}: {self.last_line}"


@dataclass
class RoleProcess:
    """Role with its current process.

    Args:
        name: name of the role.
        command: command that starts the role.
        log: file for its standard output and error.
        environment: environment variables in addition to those of this process.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    num_starts: int = 0
    is_done: bool = False
    """Whether the role has finished its work, as the learner does after its last update."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while the process is replaced."""
    _process: subprocess.Popen[bytes] | None = None
    _is_exit_expected: bool = False
    _log_start: int = 0

    def start(self) -> None:
        """Start a process."""
        with self.lock, open(self.log, "ab") as log:
            self._log_start = log.tell()
            self._is_exit_expected = False
            self.num_starts += 1
            self._process = subprocess.Popen(
                list(self.command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self.environment
            )

    @property
    def pid(self) -> int:
        """Id of the current process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> list[psutil.Process]:
        """Kill the process (SIGKILL) and return its descendants; `restart_if_exited` starts the next process."""
        with self.lock:
            self.expect_exit()
            descendants: list[psutil.Process] = []
            with suppress(psutil.NoSuchProcess):
                descendants = psutil.Process(self.pid).children(recursive=True)
            self._signal(self.pid, signal.SIGKILL)
            assert self._process is not None
            self._process.wait()
            return descendants

    def expect_exit(self) -> None:
        """Record that a fault makes the current process exit."""
        self._is_exit_expected = True

    def pause(self) -> int:
        """Stop the process (SIGSTOP) and return its id."""
        with self.lock:
            pid = self.pid
            self._signal(pid, signal.SIGSTOP)
            return pid

    def resume(self, pid: int) -> None:
        """Continue the process (SIGCONT) unless it has been replaced."""
        with self.lock:
            if pid == self.pid:
                self._signal(pid, signal.SIGCONT)

    def restart_if_exited(self) -> UnexpectedExit | None:
        """Restart the process if it has exited, as a launcher does; return an exit that no fault explains.

        A process that rejected its input (USER_ERROR_STATUS) or finished its work is not restarted.
        """
        if not self.lock.acquire(blocking=False):
            return None
        try:
            status = None if self._process is None or self.is_done else self._process.poll()
            if status is None:
                return None
            self.is_done = not self._is_exit_expected and status in (0, USER_ERROR_STATUS)
            unexpected = (
                None if self._is_exit_expected or status == 0 else UnexpectedExit(self.name, status, self.last_line())
            )
            if not self.is_done:
                self.start()
            return unexpected
        finally:
            self.lock.release()

    def stop(self) -> int:
        """Stop the process (SIGTERM) and return its exit status.

        The status is 0 if its work was not complete (STOPPED_STATUS) or it had not yet installed its signal handler.
        """
        with self.lock:
            assert self._process is not None
            self._signal(self.pid, signal.SIGCONT)
            self._process.terminate()
            try:
                status = self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
            is_early = status == -signal.SIGTERM and self.last_line() == _NO_OUTPUT
            return 0 if is_early or status == STOPPED_STATUS else status

    def last_line(self) -> str:
        """Return the last line that the process wrote."""
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else _NO_OUTPUT

    def _signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

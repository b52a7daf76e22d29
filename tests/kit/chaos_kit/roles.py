"""One role's process in a job that faults are done to: started as a deploy script starts it, and again when it ends.

Knows processes, signals and what a fault may do to one; knows no role's work.
"""

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

from deskrl.core.running.supervisor import USER_ERROR_STATUS

_STOP_S = 60.0
_NO_OUTPUT = "no output"


@dataclass(frozen=True)
class Ending:
    """A role's process that ended though no fault had ended it."""

    role: str
    status: int
    last_line: str

    def __str__(self) -> str:
        return f"{self.role} ended by itself with status {self.status}: {self.last_line}"


@dataclass
class RoleProcess:
    """A role, whichever process it is at the moment.

    Args:
        name: of the role.
        command: that starts it.
        log: what it writes.
        environment: beside this process's own.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    num_starts: int = 0
    is_done: bool = False
    """It ended well, as a learner does that has learnt all."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while one process is exchanged for another."""
    _process: subprocess.Popen[bytes] | None = None
    _is_excused: bool = False
    _log_start: int = 0

    def start(self) -> None:
        """Start a process."""
        with self.lock, open(self.log, "ab") as log:
            self._log_start = log.tell()
            self._is_excused = False
            self.num_starts += 1
            self._process = subprocess.Popen(
                list(self.command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self.environment
            )

    @property
    def pid(self) -> int:
        """Of the process at the moment."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> list[psutil.Process]:
        """kill -9; returns what had descended from the process. `tend` starts another one."""
        with self.lock:
            self.excuse()
            descendants: list[psutil.Process] = []
            with suppress(psutil.NoSuchProcess):
                descendants = psutil.Process(self.pid).children(recursive=True)
            self._signal(self.pid, signal.SIGKILL)
            assert self._process is not None
            self._process.wait()
            return descendants

    def excuse(self) -> None:
        """The process at the moment may end: a fault sees to it."""
        self._is_excused = True

    def pause(self) -> int:
        """SIGSTOP; returns the process that was stopped."""
        with self.lock:
            pid = self.pid
            self._signal(pid, signal.SIGSTOP)
            return pid

    def go_on(self, pid: int) -> None:
        """SIGCONT, if it is the same process yet."""
        with self.lock:
            if pid == self.pid:
                self._signal(pid, signal.SIGCONT)

    def tend(self) -> Ending | None:
        """Start what has ended once more, as a launcher does; an ending that no fault explains is told.

        A refusal of bad input is not started again.
        """
        if not self.lock.acquire(blocking=False):
            return None
        try:
            status = None if self._process is None or self.is_done else self._process.poll()
            if status is None:
                return None
            self.is_done = not self._is_excused and status in (0, USER_ERROR_STATUS)
            ending = None if self._is_excused or status == 0 else Ending(self.name, status, self.last_line())
            if not self.is_done:
                self.start()
            return ending
        finally:
            self.lock.release()

    def stop(self) -> int:
        """SIGTERM; the exit status, 0 also of a process that had not come to heed it, so soon after its start."""
        with self.lock:
            assert self._process is not None
            self._signal(self.pid, signal.SIGCONT)
            self._process.terminate()
            try:
                status = self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
            return 0 if status == -signal.SIGTERM and self.last_line() == _NO_OUTPUT else status

    def last_line(self) -> str:
        """What the process wrote last."""
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else _NO_OUTPUT

    def _signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

"""Processes of the session: identity, ancestry, which of them belong to the setup of the task, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from deskrl.actor.guest.credentials import acting_as

_INTERPRETERS = frozenset(
    (
        *("sh", "bash", "dash", "zsh", "ksh", "mksh", "fish", "tcsh", "csh", "ash", "busybox", "screen", "tmux"),
        *("python", "perl", "ruby", "node", "nodejs", "lua", "luajit", "tclsh", "wish", "expect", "gjs", "gjs-console"),
        *("guile", "php", "awk", "gawk", "mawk", "nawk"),
    )
)
"""File names, without versions, of shells and interpreters: what such a process does depends on its input."""
_POLL_S = 0.002
_NUM_CLEAN_PASSES = 2
"""Number of successive passes that must find nothing to end.

One pass misses a process whose parent was in `fork` when the pass began and has ended when the pass reaches it.
"""


class Process(NamedTuple):
    """One process at one moment."""

    pid: int
    parent_pid: int
    start_ticks: int
    """Start time in clock ticks since boot; together with the id it identifies a process."""
    has_terminal: bool
    is_stopped: bool
    """Whether a signal has suspended it."""
    executable: str
    """Path of its program as the process sees it; empty for a process that is ending."""
    file_id: tuple[int, int]
    """Device and inode of its program."""

    @property
    def is_interpreter(self) -> bool:
        """Whether its program is a shell or an interpreter."""
        return os.path.basename(self.executable).rstrip("0123456789.-") in _INTERPRETERS


def read_process(pid: int, user_id: int | None = None) -> Process | None:
    """Return a process; None if it has ended or is a zombie.

    Args:
        pid: process id.
        user_id: user of the process if it differs from this process's user, which cannot read its program.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(4096).rpartition(b") ")[2].split()
        if fields[0] in b"ZX":
            return None
    except (OSError, IndexError):
        return None
    executable, file_id = "", (0, 0)
    with contextlib.suppress(OSError), acting_as(user_id):  # a process that is ending has no program any more
        executable = os.readlink(f"/proc/{pid}/exe")
        status = os.stat(f"/proc/{pid}/exe")
        file_id = (status.st_dev, status.st_ino)
    has_terminal, is_stopped = fields[4] != b"0", fields[0] in b"Tt"
    return Process(pid, int(fields[1]), int(fields[19]), has_terminal, is_stopped, executable, file_id)


class SessionProcesses(ABC):
    """All processes of one session."""

    file_user_id: int | None
    """User of the processes if it differs from this process's user; see `read_process`."""

    @abstractmethod
    def is_member(self, pid: int) -> bool:
        """Return whether a process belongs to the session."""

    @abstractmethod
    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the session at one moment, so that none can fork in between."""

    @abstractmethod
    def is_signalled(self, pid: int) -> bool:
        """Return whether `signal_all` reaches a process."""

    def living(self) -> Iterator[Process]:
        """Yield the processes of the session except zombies."""
        for pid in list_all_pids():
            if self.is_member(pid) and (process := read_process(pid, self.file_user_id)) is not None:
                yield process

    def kill_all(self, timeout_s: float) -> None:
        """Kill all processes of the session and wait for their end; raises TimeoutError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        num_clean_passes = 0
        while num_clean_passes < _NUM_CLEAN_PASSES:
            self.signal_all(signal.SIGKILL)
            num_clean_passes = 0 if any(True for _ in self.living()) else num_clean_passes + 1
            _wait_for_next_pass(deadline, timeout_s)


class SetupPrograms:
    """Processes that existed when the setup of the task ended."""

    def __init__(self, processes: SessionProcesses) -> None:
        self._processes = processes
        self._setup: dict[tuple[int, int], Process] | None = None

    @property
    def is_setup_complete(self) -> bool:
        """Whether `remember` was called."""
        return self._setup is not None

    def read(self, pid: int) -> Process | None:
        """Return a process of the session; None if it has ended."""
        return read_process(pid, self._processes.file_user_id)

    def remember(self) -> None:
        """Remember the processes that exist now as those of the setup."""
        self._setup = {(process.pid, process.start_ticks): process for process in self._processes.living()}

    def keeps(self, process: Process) -> bool:
        """Return whether a process belongs to the setup.

        It does if it existed at the end of the setup and still runs the same program, or if it descends from such a
        process and runs the same program, unless that is a shell or an interpreter.
        """
        if self._setup is None:
            return True
        current: Process | None = process
        while current is not None:
            known = self._setup.get((current.pid, current.start_ticks))
            if known is not None:
                is_same_program = known.file_id == current.file_id == process.file_id and process.file_id != (0, 0)
                return is_same_program and (process is current or not process.is_interpreter)
            current = self.read(current.parent_pid) if current.parent_pid > 1 else None
        return False

    def kill_others(self, timeout_s: float) -> None:
        """Kill all processes that do not belong to the setup, and suspend its shells and interpreters in terminals.

        All processes are suspended meanwhile, because processes that fork faster than they are found would escape.

        Raises:
            TimeoutError: processes remained after `timeout_s`.
        """
        self._processes.signal_all(signal.SIGSTOP)
        suspended: set[int] = set()
        try:
            self._kill_stopped(timeout_s)
            suspended = {process.pid for process in self._processes.living() if _is_command_line(process)}
        finally:
            for pid in list_all_pids():
                if pid not in suspended and self._processes.is_signalled(pid):
                    send_signal(pid, signal.SIGCONT)

    def _kill_stopped(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        num_clean_passes = 0
        while num_clean_passes < _NUM_CLEAN_PASSES:
            num_clean_passes += 1
            for process in self._processes.living():
                if not self.keeps(process):
                    send_signal(process.pid, signal.SIGKILL)
                    num_clean_passes = 0
                elif process.is_interpreter and not process.is_stopped:  # it may be in `fork`
                    num_clean_passes = 0
            _wait_for_next_pass(deadline, timeout_s)


def _is_command_line(process: Process) -> bool:
    return process.has_terminal and process.is_interpreter


def _wait_for_next_pass(deadline: float, timeout_s: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"processes of the session still run after {timeout_s:g} s")
    time.sleep(_POLL_S)


def list_all_pids() -> list[int]:
    """Return the ids of all processes of this process's namespace."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process; does nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

"""Process supervisor of one run on one machine: starts, watches, restarts and stops roles, and cleans up after a crash.

Each child leads its own session and carries the run's mark in its environment. All descendants of a child are found by
the mark, even after their parent has exited.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from deskrl.core.errors import UserError
from deskrl.core.process_lifecycle import supervised_environment
from deskrl.core.run_dir import RunDir

RUN_MARK = "DESKRL_RUN_FOLDER"
"""Environment variable that names the run directory in every process of the run."""

USER_ERROR_STATUS = 2
MAX_RESTARTS = 5
STOP_TIMEOUT_S = 20.0
SAVING_TIMEOUT_S = 900.0
"""Time limit for a stopping learner to finish the checkpoint that it is writing. The 124 GB of a 7B model take over a
minute on a fast disk; killing the learner earlier would lose updates."""
_STILL_S = 60.0
"""A checkpoint counts as being written until this long after its last write (fsync does not change file times)."""
_POLL_S = 0.05
_SERVERS = ("replay", "inference")
"""Roles that serve requests of other roles; they stop last."""


@dataclass
class Child:
    """Current process of one role and its restart count."""

    name: str
    role: str
    command: list[str]
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that only this child gets."""
    num_restarts: int = 0
    done: bool = False
    log: IO[bytes] = field(repr=False, kw_only=True)
    log_start: int = 0
    """Size of the log in bytes when this child was started."""


class RoleFailed(RuntimeError):
    """A role will not be restarted: it rejected its input or crashed more than MAX_RESTARTS times."""

    def __init__(self, name: str, status: int, last_line: str) -> None:
        super().__init__(f"{name} ended with status {status}: {last_line}")
        self.name = name
        self.status = status
        self.last_line = last_line


class Supervisor:
    """Owns the processes of a run. It holds the lock file of the run, which the kernel releases when it exits."""

    def __init__(self, folder: RunDir) -> None:
        """Acquire the run's lock and clean up what a killed supervisor left behind.

        Raises:
            UserError: another process supervises the run.
        """
        self._folder = folder
        self.temporary = temporary_folder(folder)
        self._lock = open(folder.lock, "w")  # noqa: SIM115 - open while the supervisor lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder.root}: another process is running this run", "stop that process, or choose another --name"
            ) from error
        self.num_leftovers = end_leftovers(folder)
        self.temporary.mkdir(mode=0o700)
        self.children: dict[str, Child] = {}

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start `deskrl ARGUMENTS` as child NAME; its output is appended to logs/NAME.log."""
        environment = environment or {}
        command = [sys.executable, "-m", "deskrl.cli.main", *arguments]
        log = open(self._folder.logs / f"{name}.log", "ab")  # noqa: SIM115 - closed when the child is stopped
        log_start = log.tell()
        process = self._spawn(command, log, environment)
        child = Child(name, arguments[0], command, process, environment, log=log, log_start=log_start)
        self.children[name] = child
        return child

    def watch(self, finite: Sequence[str] = ()) -> None:
        """Poll every child once: restart crashed children and mark `finite` children that exited with status 0 as done.

        Raises:
            RoleFailed: a child rejected its input or crashed too often.
        """
        for child in self.children.values():
            status = child.process.poll()
            if status is None or child.done:
                continue
            if status == 0 and child.name in finite:
                child.done = True
                continue
            if status == USER_ERROR_STATUS or child.num_restarts >= MAX_RESTARTS:
                raise RoleFailed(child.name, status, self.last_line(child.name))
            child.num_restarts += 1
            self._folder.append_metrics("restart", role=child.name, status=status, num_restarts=child.num_restarts)
            end_session(child.process.pid)
            child.process = self._spawn(child.command, child.log, child.environment)

    def run_to_end(
        self, name: str, *arguments: str, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a child and wait until it exits with status 0.

        Raises:
            RoleFailed: it exited with another status or exceeded `timeout_s`.
        """
        self.start(name, *arguments, environment=environment)
        self.wait_to_end(name, timeout_s)

    def wait_to_end(self, name: str, timeout_s: float) -> None:
        """Wait until a child exits with status 0, and remove it.

        Raises:
            RoleFailed: it exited with another status or exceeded `timeout_s`.
        """
        try:
            status = self.children[name].process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.stop([name])
            raise RoleFailed(name, -1, f"still running after {timeout_s:.0f} s") from None
        last_line = self.last_line(name)
        self.stop([name])
        if status != 0:
            raise RoleFailed(name, status, last_line)

    def stop(self, names: Sequence[str]) -> None:
        """Stop the named children that exist: clients first, then the servers that they call."""
        leaving = [self.children.pop(name) for name in names if name in self.children]
        self._stop_together([child for child in leaving if child.role not in _SERVERS])
        self._stop_together([child for child in leaving if child.role in _SERVERS])

    def _stop_together(self, leaving: Sequence[Child]) -> None:
        """Send SIGTERM to each child, wait, then kill the remaining processes of their sessions."""
        for child in leaving:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        asked_s = time.monotonic()
        late = []
        for child in leaving:
            if not self._ends(child, asked_s):
                late.append(child.name)
            end_session(child.process.pid)
            child.process.wait()
            child.log.close()
        for name in late:  # last, because it fails on a full disk
            self._folder.append_metrics("stop_timeout", role=name)

    def is_writing_checkpoint(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._folder.is_writing_checkpoint(_STILL_S)

    def _ends(self, child: Child, asked_s: float) -> bool:
        """Wait until a child exits or its time limit is over; a learner's starts after its checkpoint is written."""
        deadline_s = asked_s + STOP_TIMEOUT_S
        while child.process.poll() is None:
            now_s = time.monotonic()
            if child.role == "learner" and self.is_writing_checkpoint():
                deadline_s = min(now_s, asked_s + SAVING_TIMEOUT_S) + STOP_TIMEOUT_S
            if now_s >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> list[str]:
        """Stop all children and remove what is left of the run; returns descriptions of what was left."""
        self.stop(list(self.children))
        leftovers = describe_leftovers(self._folder)
        end_leftovers(self._folder)
        self._lock.close()
        return leftovers

    def num_restarts(self) -> int:
        """Return the number of restarts of all children, read from metrics.jsonl so that it survives the supervisor."""
        return sum(1 for _ in self._folder.read_metrics("restart"))

    def last_line(self, name: str) -> str:
        """Return the last relevant log line of a child; see `last_line_of`."""
        return last_line_of(self._folder.logs / f"{name}.log", self.children[name].log_start)

    def memory_bytes(self) -> int:
        """Return the proportional set size of all processes of the run in bytes (shared pages are counted once)."""
        return sum(_pss_bytes(process) for process in marked_processes(self._folder))

    def _spawn(
        self, command: list[str], log: IO[bytes], extra_environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        environment = {
            # Learner and inference compute at the same time; one thread per core in both would compete for the cores.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
            **os.environ,
            **supervised_environment(),
            RUN_MARK: str(self._folder.root),
            "TMPDIR": str(self.temporary),
            # PyTorch would otherwise cache compiled code in the temporary folder, which must be empty at the end.
            "TORCHINDUCTOR_CACHE_DIR": str(self._folder.root / "cache"),
            "PYTHONUNBUFFERED": "1",
            **extra_environment,
        }
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def last_line_of(log: Path, start: int) -> str:
    """Return the last line of a log after byte `start`, preferably the last error that deskrl itself printed.

    Engines may print further lines after that error.
    """
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("deskrl: ")]
    return (errors or lines or ["no output (possibly the disk is full)"])[-1]


def temporary_folder(folder: RunDir) -> Path:
    """Return the temporary folder of the run. Its path is short, because Unix socket paths are limited."""
    name = hashlib.sha256(str(folder.root).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"deskrl-{name}"


def marked_processes(folder: RunDir) -> list[psutil.Process]:
    """Return all processes that carry the run's mark, except this one."""
    found = []
    mark = f"{RUN_MARK}={folder.root}".encode()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue  # exited in between, or owned by another user
        if mark in environment.split(b"\0"):
            found.append(process)
    return found


def describe_leftovers(folder: RunDir) -> list[str]:
    """Describe what is left of a stopped run: processes, mounts, temporary files and shared memory."""
    temporary = temporary_folder(folder)
    found = [f"process {process.pid} {_name(process)}" for process in marked_processes(folder)]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    found += [f"mount {mount}" for mount in mounts if mount.startswith(f"{temporary}/")]
    found += [f"file {path}" for path in sorted(temporary.rglob("*"))] if temporary.exists() else []
    found += [f"shared memory {path}" for path in sorted(Path("/dev/shm").glob(f"{temporary.name}*"))]
    return found


def end_leftovers(folder: RunDir) -> int:
    """Kill and remove everything that `describe_leftovers` lists; returns the number of items."""
    temporary = temporary_folder(folder)
    found = describe_leftovers(folder)
    processes = marked_processes(folder)
    for process in processes:
        _signal(process.pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=5)
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if line.split()[1].startswith(f"{temporary}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
    for path in Path("/dev/shm").glob(f"{temporary.name}*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    return len(found)


def end_session(leader_pid: int) -> None:
    """Kill all processes of a session, including its leader."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader_pid:
                _signal(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "(exited)"


def _pss_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0  # exited in between
    return 0

"""Processes of one run on one machine: start, watch, restart, stop, and end what a killed supervisor left.

Knows processes and the run's temporary folder; knows no role's work. Each child leads a session of its own and carries
the run's mark in its environment, so that whatever descends from it is found again, whoever its parent is by then.
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
from deskrl.core.lifetime import supervised_environment
from deskrl.core.runfolder import RunFolder

RUN_MARK = "DESKRL_RUN_FOLDER"
"""Environment variable that names the run in every process of it."""

USER_ERROR_STATUS = 2
MAX_RESTARTS = 5
STOP_TIMEOUT_S = 20.0
SAVING_TIMEOUT_S = 900.0
"""How long a learner that is told to end may take for the checkpoint that it has begun: 124 GB of a 7B take over a
minute on a fast disk, and updates are lost with them."""
_STILL_S = 60.0
"""A checkpoint of which nothing has been written for so long is not being written: files are made durable meanwhile."""
_POLL_S = 0.05
_SERVERS = ("replay", "inference")
"""Roles that the others call."""


@dataclass
class Child:
    """One role's process, as it is now and as it has been restarted."""

    name: str
    role: str
    command: list[str]
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it sees that others do not."""
    num_restarts: int = 0
    done: bool = False
    log: IO[bytes] = field(repr=False, kw_only=True)
    log_start: int = 0
    """Bytes that earlier processes of this name had written."""


class RoleFailed(RuntimeError):
    """A role ended for good: refused its input, or crashed more often than it may be restarted."""

    def __init__(self, name: str, status: int, last_line: str) -> None:
        super().__init__(f"{name} ended with status {status}: {last_line}")
        self.name = name
        self.status = status
        self.last_line = last_line


class Supervisor:
    """Owns a run's processes. One supervisor at a time holds the run's lock; the kernel drops it with the process."""

    def __init__(self, folder: RunFolder) -> None:
        """Take the run over: refuse if another supervisor lives, end what a dead one left.

        Raises:
            UserError: the run is supervised by a living process.
        """
        self._folder = folder
        self.temporary = temporary_folder(folder)
        self._lock = open(folder.lock, "w")  # noqa: SIM115 - held as long as the supervisor lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder.root} is being run by another process", "stop that one first, or choose another --name"
            ) from error
        self.num_leftovers = end_leftovers(folder)
        self.temporary.mkdir(mode=0o700)
        self.children: dict[str, Child] = {}

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start `deskrl ARGUMENTS` under a name; its output goes to logs/NAME.log."""
        environment = environment or {}
        command = [sys.executable, "-m", "deskrl.core.cli", *arguments]
        log = open(self._folder.logs / f"{name}.log", "ab")  # noqa: SIM115 - closed when the child is stopped
        log_start = log.tell()
        process = self._spawn(command, log, environment)
        child = Child(name, arguments[0], command, process, environment, log=log, log_start=log_start)
        self.children[name] = child
        return child

    def watch(self, finite: Sequence[str] = ()) -> None:
        """Look once at every child: a crash is restarted, a clean end of a `finite` child is noted as done.

        Raises:
            RoleFailed: a child refused its input, or was restarted too often.
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
        """Start a child and wait for its clean end.

        Raises:
            RoleFailed: it ended otherwise, or not in time.
        """
        child = self.start(name, *arguments, environment=environment)
        try:
            status = child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.stop([name])
            raise RoleFailed(name, -1, f"no end within {timeout_s:.0f} s") from None
        last_line = self.last_line(name)
        self.stop([name])
        if status != 0:
            raise RoleFailed(name, status, last_line)

    def stop(self, names: Sequence[str]) -> None:
        """Stop those of these children that there are: first whoever calls others, and so misses nobody."""
        leaving = [self.children.pop(name) for name in names if name in self.children]
        self._stop_together([child for child in leaving if child.role not in _SERVERS])
        self._stop_together([child for child in leaving if child.role in _SERVERS])

    def _stop_together(self, leaving: Sequence[Child]) -> None:
        """SIGTERM to each, wait, then kill whatever is left of their sessions."""
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
        for name in late:  # at the end, because on a full disk it fails
            self._folder.append_metrics("stop_timeout", role=name)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._folder.is_saving(_STILL_S)

    def _ends(self, child: Child, asked_s: float) -> bool:
        """Wait for a child's end while it has time for it: a learner, once its checkpoint is written, as much again."""
        deadline_s = asked_s + STOP_TIMEOUT_S
        while child.process.poll() is None:
            now_s = time.monotonic()
            if child.role == "learner" and self.is_saving():
                deadline_s = min(now_s, asked_s + SAVING_TIMEOUT_S) + STOP_TIMEOUT_S
            if now_s >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> list[str]:
        """Stop everything, then name what of the run is still there (and end that too); nothing is the normal case."""
        self.stop(list(self.children))
        leftovers = describe_leftovers(self._folder)
        end_leftovers(self._folder)
        self._lock.close()
        return leftovers

    def num_restarts(self) -> int:
        """Restarts of all children so far, from the run's metrics (so it survives a restart of the supervisor)."""
        return sum(1 for _ in self._folder.read_metrics("restart"))

    def last_line(self, name: str) -> str:
        """The last line that a role wrote, for a person; see `last_line_of`."""
        return last_line_of(self._folder.logs / f"{name}.log", self.children[name].log_start)

    def memory_bytes(self) -> int:
        """Proportional memory of all processes of the run (shared pages counted once)."""
        return sum(_pss_bytes(process) for process in marked_processes(self._folder))

    def _spawn(self, command: list[str], log: IO[bytes], special: Mapping[str, str]) -> subprocess.Popen[bytes]:
        environment = {
            # Learner and inference compute at the same time; as many threads as cores in both spin against each other.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
            **os.environ,
            **supervised_environment(),
            RUN_MARK: str(self._folder.root),
            "TMPDIR": str(self.temporary),
            # PyTorch would keep compiled code in the temporary folder, where nothing may stay.
            "TORCHINDUCTOR_CACHE_DIR": str(self._folder.root / "cache"),
            "PYTHONUNBUFFERED": "1",
            **special,
        }
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def last_line_of(log: Path, start: int) -> str:
    """The last line of a log, `start` bytes left out; its last refusal, if there is one (engines may talk on after)."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    refusals = [line for line in lines if line.startswith("deskrl: ")]
    return (refusals or lines or ["no output (is the disk full?)"])[-1]


def temporary_folder(folder: RunFolder) -> Path:
    """The run's own temporary folder: a short path (unix sockets live there) that follows from the run's."""
    name = hashlib.sha256(str(folder.root).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"deskrl-{name}"


def marked_processes(folder: RunFolder) -> list[psutil.Process]:
    """Every process, whoever its parent, that carries the run's mark; this one excepted."""
    found = []
    mark = f"{RUN_MARK}={folder.root}".encode()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue  # ended meanwhile, or another user's
        if mark in environment.split(b"\0"):
            found.append(process)
    return found


def describe_leftovers(folder: RunFolder) -> list[str]:
    """What of a stopped run is still there: processes, mounts, files in its temporary folder, shared memory."""
    temporary = temporary_folder(folder)
    found = [f"process {process.pid} {_name(process)}" for process in marked_processes(folder)]
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    found += [f"mount {mount}" for mount in mounts if mount.startswith(f"{temporary}/")]
    found += [f"file {path}" for path in sorted(temporary.rglob("*"))] if temporary.exists() else []
    found += [f"shared memory {path}" for path in sorted(Path("/dev/shm").glob(f"{temporary.name}*"))]
    return found


def end_leftovers(folder: RunFolder) -> int:
    """End and remove everything that `describe_leftovers` would name; returns how many things that were."""
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
    """Kill what is left of a child's session, its leader included."""
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
        return "(gone)"


def _pss_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0  # ended meanwhile
    return 0

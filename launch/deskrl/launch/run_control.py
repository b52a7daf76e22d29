"""Control of runs that other processes started: who supervises a run, and how it is stopped or deleted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.launch.supervisor import Supervisor
from deskrl.replay.schema import FILE_NAME

_LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Holder:
    """Process that holds the lock of a run."""

    pid: int | None
    """Process id of the supervisor; None if it runs on another machine, or in a container of its own."""


def is_run_directory(root: Path) -> bool:
    """Return whether a directory was created by deskrl for a run or an evaluation."""
    folder = RunDir(root)
    has_store = folder.replay.is_dir() or folder.replay.is_symlink()  # the link of `replay.folder`
    return folder.config.is_file() and has_store and folder.results.is_dir()


def check_run_directory(root: Path) -> RunDir:
    """Return the run directory at a path.

    Raises:
        UserError: the path is a link, does not exist, or contains no run.
    """
    if root.is_symlink():
        raise UserError(f"{root}: is a link", f"name the directory itself: {root.resolve()}")
    if (root / "sweep.json").is_file():
        raise UserError(f"{root}: is a sweep", f"name one of its runs, such as {root}/ARM-s0")
    if not is_run_directory(root):
        what = "contains no run" if root.is_dir() else "not found"
        raise UserError(f"{root}: {what}", "`deskrl runs list` shows the runs of a folder")
    return RunDir(root.resolve())


def find_holder(folder: RunDir) -> Holder | None:
    """Return the process that supervises a run; None if it does not run under a supervisor."""
    try:
        status = folder.lock.stat()
    except OSError:
        return None
    for pid in _holders_of(status.st_ino):
        if _has_open(pid, status):
            return Holder(pid)
    # Locks of other machines and of other process namespaces are not listed, but they exclude this one.
    return Holder(None) if _is_locked(folder.lock) else None


def _holders_of(inode: int) -> list[int]:
    """Return the processes that hold an exclusive lock on a file with this inode number, on any file system."""
    pids = []
    for line in _LOCKS.read_text(encoding="ascii").splitlines():
        words = line.split()
        if words[1:4] == ["FLOCK", "ADVISORY", "WRITE"] and words[5].rpartition(":")[2] == str(inode):
            pids.append(int(words[4]))
    return pids


def _has_open(pid: int, status: os.stat_result) -> bool:
    """Return whether a process has this file open; True if that cannot be read, as for a process of another user."""
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), status):
                    return True
    except PermissionError:
        return True
    except OSError:  # the process has ended
        pass
    return False


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def stop_run(root: Path) -> None:
    """Stop a run in good order, as Ctrl-C in its terminal does, and wait until it has ended.

    Raises:
        UserError: there is no run, it is not running, it runs elsewhere, or it belongs to another user.
    """
    folder = check_run_directory(root)
    holder = find_holder(folder)
    if holder is None:
        raise UserError(
            f"{root}: is not running under a supervisor of this machine",
            "stop a run that Slurm, Kubernetes, compose or systemd started with their own commands",
        )
    if holder.pid is None:
        raise UserError(f"{root}: is running on another machine or in another container", "run the same command there")
    try:
        supervisor = psutil.Process(holder.pid)
        supervisor.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return  # it has just ended
    except psutil.AccessDenied as error:
        raise UserError(f"{root}: process {holder.pid} belongs to another user", "run this as that user") from error
    supervisor.wait()


def is_running(folder: RunDir) -> bool:
    """Return whether a run is supervised, or its replay service runs without a supervisor (Slurm, compose)."""
    return find_holder(folder) is not None or _is_locked(folder.replay / "lock")


def check_not_running(folder: RunDir) -> None:
    """Raise UserError if a run is supervised, or if its replay service runs without a supervisor."""
    if find_holder(folder) is not None:
        raise UserError(f"{folder.root}: is running", f"stop it first: deskrl runs stop {folder.root}")
    if _is_locked(folder.replay / "lock"):
        raise UserError(f"{folder.root}: its replay service is running", "stop its roles first")


def delete_run(root: Path) -> int:
    """Delete a run directory and its store; returns the number of bytes that this frees.

    Links in it are removed, not followed, except that to a store in `replay.folder`.

    Raises:
        UserError: there is no run, it is running, or a file cannot be deleted.
    """
    folder = check_run_directory(root)
    check_not_running(folder)
    supervisor = Supervisor(folder)  # holds the lock, so that the run cannot start meanwhile; ends leftover processes
    try:
        num_bytes = disk_bytes(folder.root)
        if folder.replay.is_symlink() and (folder.replay / FILE_NAME).is_file():
            num_bytes += disk_bytes(folder.replay.resolve())
            shutil.rmtree(folder.replay.resolve())
        shutil.rmtree(folder.root)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be deleted: {error.strerror}", "change its permissions") from error
    finally:
        supervisor.close()
    return num_bytes


def disk_bytes(root: Path) -> int:
    """Return the space that a directory takes on disk in bytes; files with several names count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _, names in os.walk(root):
        for name in (".", *names):
            with contextlib.suppress(OSError):  # deleted in the meantime
                status = os.lstat(os.path.join(folder, name))
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total

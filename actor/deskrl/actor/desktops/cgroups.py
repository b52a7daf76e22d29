"""Control groups (cgroups v1 and v2) that limit memory and processes of one desktop.

A group is created under the group of this process (v1: under the mount of the controller as this process sees it).
That requires root or a delegated group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deskrl.actor.guest.limits import NUM_RESERVED_PROCESSES, RESERVED_BYTES, X_MEMORY_FRACTION

_log = logging.getLogger(__name__)
_MOUNT = Path("/sys/fs/cgroup")
_REMOVE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class ControlGroups:
    """Control groups of one desktop: one per controller (v1) or one for all controllers (v2)."""

    folders: tuple[Path, ...] = ()
    """Groups of the whole desktop, without those inside them."""
    session_folders: tuple[Path, ...] = ()
    """Groups of the session's programs, inside the groups of the desktop."""
    judge_folders: tuple[Path, ...] = ()
    """Groups of everything else: those of the desktop (v1), or groups inside them (v2)."""
    limits_memory: bool = False
    limits_processes: bool = False

    @property
    def all_folders(self) -> tuple[Path, ...]:
        """All groups in an order in which they can be removed."""
        return tuple(dict.fromkeys((*self.session_folders, *self.judge_folders, *self.folders)))

    @property
    def membership_files(self) -> list[Path]:
        """Files to which the first process of the desktop writes its id to join the groups."""
        return [folder / "cgroup.procs" for folder in self.judge_folders]

    @property
    def session_files(self) -> list[Path]:
        """Files to which a program of the session writes its id to join the groups."""
        return [folder / "cgroup.procs" for folder in self.session_folders]

    def was_out_of_memory(self) -> bool:
        """Return whether the desktop or its session has reached its own memory limit."""
        return any(_count(folder, "memory.failcnt", "memory.events", "oom ") for folder in self.all_folders)


def create_groups(name: str, memory_bytes: int, max_processes: int) -> ControlGroups:
    """Create the control groups that this machine permits.

    The limits apply to the programs of the session. The guest server and the X server have a reserve in addition, so
    that programs which use up their limits cannot keep them from working. Limits that cannot be enforced by a control
    group are logged once per process.

    Args:
        name: name of the groups, unique on this machine.
        memory_bytes: memory limit; swap is disabled.
        max_processes: limit of processes and threads.
    """
    whole = {
        "memory": _memory_files(memory_bytes + memory_bytes // X_MEMORY_FRACTION + RESERVED_BYTES),
        "pids": {"pids.max": str(max_processes + NUM_RESERVED_PROCESSES)},
    }
    session = {"memory": _memory_files(memory_bytes), "pids": {"pids.max": str(max_processes)}}
    folders: dict[Path, None] = {}
    done = set()
    for controller in ("memory", "pids", "cpu"):
        for parent in _parents(controller):
            folder = parent / name
            if _make_group(folder, whole.get(controller, {}), controller):
                folders[folder] = None
                done.add(controller)
                break
    if not {"memory", "pids"} <= done:
        _report_missing(tuple(sorted({"memory", "pids"} - done)))
    inside = [_divide(folder, session) for folder in folders]
    return ControlGroups(
        tuple(folders),
        tuple(folder for folder, _ in inside),
        tuple(folder for _, folder in inside),
        "memory" in done,
        "pids" in done,
    )


def _divide(folder: Path, limits: dict[str, dict[str, str]]) -> tuple[Path, Path]:
    """Create the group of the session inside a desktop's group; return it and the group of everything else."""
    session = folder / "session"
    judge = folder
    if (folder / "cgroup.subtree_control").exists():  # v2: only groups without processes may pass controllers on
        judge = folder / "judge"
        judge.mkdir(exist_ok=True)
        available = (folder / "cgroup.controllers").read_text(encoding="ascii").split()
        enabled = " ".join(f"+{controller}" for controller in ("memory", "pids", "cpu") if controller in available)
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(enabled)
    session.mkdir(exist_ok=True)
    for files in limits.values():
        _write_limits(session, files)
    return session, judge


def remove_groups(folders: tuple[Path, ...]) -> None:
    """Remove groups whose processes have ended, retrying briefly because the kernel releases a group with a delay."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    for folder in folders:
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    _log.warning("cannot remove control group %s", folder)
                    break
                time.sleep(0.01)


def num_host_kills() -> int:
    """Return how many processes of this machine out-of-memory killers have ended since boot."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def supports_process_limit() -> bool:
    """Return whether RLIMIT_NPROC is counted per user namespace and therefore per sandbox (Linux 5.14 and later)."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)) or 0)) >= (5, 14)


def _memory_files(memory_bytes: int) -> dict[str, str]:
    """Return limit files of both versions and their contents; a group contains the files of its version only."""
    return {"memory.limit_in_bytes": str(memory_bytes), "memory.max": str(memory_bytes), "memory.swap.max": "0"}


def _make_group(folder: Path, limits: dict[str, str], controller: str) -> bool:
    created = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        has_controller = any(folder.glob(f"{controller}.*"))
        if has_controller:
            _write_limits(folder, limits)
        usable = has_controller and os.access(folder / "cgroup.procs", os.W_OK)
    except OSError:
        usable = False
    if not usable and created and folder.exists():
        folder.rmdir()
    return usable


def _write_limits(folder: Path, limits: dict[str, str]) -> None:
    for name, value in limits.items():
        if (folder / name).exists():
            (folder / name).write_text(value)


def _count(folder: Path, file_v1: str, file_v2: str, label: str) -> int:
    """Return a counter of a memory group; 0 if the group or the counter does not exist."""
    with contextlib.suppress(OSError):
        if (folder / file_v1).exists():
            text = (folder / file_v1).read_text(encoding="ascii")
            return int(text if text.strip().isdigit() else text.partition(label)[2].split("\n")[0] or 0)
        lines = (folder / file_v2).read_text(encoding="ascii").splitlines()
        return sum(int(line.removeprefix(label)) for line in lines if line.startswith(label))
    return 0


def _parents(controller: str) -> list[Path]:
    """Return folders in which a group of this controller may be created, in order of preference."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = _MOUNT / controllers
            own = mount / path.lstrip("/")
            return [own if own.is_dir() else mount]
    if not (_MOUNT / "cgroup.controllers").exists():
        return []
    # v2: a group that contains processes cannot delegate controllers to children, so usually only a sibling works.
    own = _MOUNT / _version_2_path().lstrip("/")
    return [own, own.parent] if own != _MOUNT else [own]


@cache
def _version_2_path() -> str:
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


@cache
def _report_missing(controllers: tuple[str, ...]) -> None:
    _log.warning(
        "cannot create control groups for %s: the limits apply to each process instead of each desktop (hint: run as "
        "root or in a group that systemd delegates)",
        " and ".join(controllers),
    )

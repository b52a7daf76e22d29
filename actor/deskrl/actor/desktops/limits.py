"""Memory, process and processor limits of one desktop: control groups where they can be made, else resource limits.

Knows control groups of both versions, nothing of sandboxes. A control group is made under the group of this process
(version 1: under the controller's own mount as this process sees it), which needs root or a delegated group.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LOGGER = logging.getLogger(__name__)
_MOUNT = Path("/sys/fs/cgroup")
_REMOVE_S = 2.0


@dataclass(frozen=True)
class ControlGroups:
    """The groups of one desktop, one a controller (version 1) or one for all (version 2)."""

    folders: tuple[Path, ...] = ()
    limits_memory: bool = False
    limits_processes: bool = False

    @property
    def membership_files(self) -> list[Path]:
        """Files into which a process writes its id to join."""
        return [folder / "cgroup.procs" for folder in self.folders]


def create_groups(name: str, memory_bytes: int, max_processes: int) -> ControlGroups:
    """Make the groups that this machine allows; what cannot be limited by one is logged once for all desktops."""
    limited = {"memory": _memory_files(memory_bytes), "pids": {"pids.max": str(max_processes)}}
    folders: dict[Path, None] = {}
    done = set()
    for controller in ("memory", "pids", "cpu"):
        for parent in _parents(controller):
            folder = parent / name
            if _make_group(folder, limited.get(controller, {}), controller):
                folders[folder] = None
                done.add(controller)
                break
    if not {"memory", "pids"} <= done:
        _report_missing(tuple(sorted({"memory", "pids"} - done)))
    return ControlGroups(tuple(folders), "memory" in done, "pids" in done)


def remove_groups(folders: tuple[Path, ...]) -> None:
    """Remove groups whose processes have ended; the kernel may take a moment to notice that they have."""
    deadline = time.monotonic() + _REMOVE_S
    for folder in folders:
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    _LOGGER.warning("control group %s could not be removed", folder)
                    break
                time.sleep(0.01)


def supports_process_limit() -> bool:
    """Whether RLIMIT_NPROC counts each sandbox by itself: since Linux 5.14 it does so per user namespace."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)) or 0)) >= (5, 14)


def _memory_files(memory_bytes: int) -> dict[str, str]:
    """File names of both versions; a group has those of its own."""
    return {"memory.limit_in_bytes": str(memory_bytes), "memory.max": str(memory_bytes), "memory.swap.max": "0"}


def _make_group(folder: Path, limits: dict[str, str], controller: str) -> bool:
    created = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        has_controller = any(folder.glob(f"{controller}.*"))
        if has_controller:
            for name, value in limits.items():
                if (folder / name).exists():
                    (folder / name).write_text(value)
        usable = has_controller and os.access(folder / "cgroup.procs", os.W_OK)
    except OSError:
        usable = False
    if not usable and created and folder.exists():
        folder.rmdir()
    return usable


def _parents(controller: str) -> list[Path]:
    """Where a group of this controller may be made, best first."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = _MOUNT / controllers
            own = mount / path.lstrip("/")
            return [own if own.is_dir() else mount]
    if not (_MOUNT / "cgroup.controllers").exists():
        return []
    # Version 2: a group that holds processes hands no controllers on, so that a sibling is the usual case.
    own = _MOUNT / _version_2_path().lstrip("/")
    return [own, own.parent] if own != _MOUNT else [own]


@cache
def _version_2_path() -> str:
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


@cache
def _report_missing(controllers: tuple[str, ...]) -> None:
    _LOGGER.warning(
        "no control group for %s can be made here: desktops are limited per process instead (run as root, or in a "
        "group that systemd delegates, for a limit per desktop)",
        " and ".join(controllers),
    )

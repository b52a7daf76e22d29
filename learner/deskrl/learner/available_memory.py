"""Memory available to a process, within the limits of its control groups (cgroup v1 and v2).

Containers, pods and Slurm jobs have memory limits that the figures of the machine do not show; a process that exceeds
them is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes(proc: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be allocated without swapping or reaching the limit of a control group.

    Args:
        proc: procfs directory of the process.
        groups: mount point of the control groups.
    """
    least = int(psutil.virtual_memory().available)
    for folder, limit_name, used_name, cache_name in _memory_groups(proc, groups):
        limit = _number(folder / limit_name)
        if limit is not None:
            # The page cache counts as used, but is reclaimed on demand.
            used = (_number(folder / used_name) or 0) - _cached_bytes(folder / "memory.stat", cache_name)
            least = min(least, limit - used)
    return max(0, least)


def _memory_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield each group of the process and its ancestors, with its file names of limit and usage and its cache key."""
    for line in (proc / "cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = groups / "memory"
        else:
            continue
        # In a container the path may be that on the host, while the mount is the group of the container.
        folder = mount / path.lstrip("/")
        while folder != mount:
            yield folder, *names
            folder = folder.parent
        yield mount, *names


def _number(path: Path) -> int | None:
    """Return the number in a file; None if the file is missing or holds no number (`max`: no limit)."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _cached_bytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

"""How much memory a process may still take: the machine's, or what is left of its control groups' limits.

A container, a pod and a Slurm job each have a limit that the machine's own figures do not show, and whoever goes over
it is killed. Knows Linux's two kinds of control groups; knows nothing of what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes(proc: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that may be taken without swapping, and without reaching the limit of any group that the process is in.

    Args:
        proc: of the process, where its groups are named.
        groups: where control groups are mounted.
    """
    least = int(psutil.virtual_memory().available)
    for folder, limit_name, used_name, cache_name in _memory_groups(proc, groups):
        limit = _number(folder / limit_name)
        if limit is not None:
            # Cached pages of files count as used, and are given back when they are needed.
            used = (_number(folder / used_name) or 0) - _cached_bytes(folder / "memory.stat", cache_name)
            least = min(least, limit - used)
    return max(0, least)


def _memory_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Each group of the process and those above it, with the names of their limit, their use and their cache."""
    for line in (proc / "cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = groups / "memory"
        else:
            continue
        # Within a container the path may be the host's, and the mount the container's own group.
        folder = mount / path.lstrip("/")
        while folder != mount:
            yield folder, *names
            folder = folder.parent
        yield mount, *names


def _number(path: Path) -> int | None:
    """What a file says; None where there is no such file, or no limit."""
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

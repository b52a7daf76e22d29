"""Removal of embedded desktops whose actor was killed.

Each desktop's folder contains a record of its owner process and its control groups. If the owner has ended, the
desktop is an orphan: its processes, which have the folder on their command line, are killed, and its groups and folder
are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from deskrl.actor.desktops.cgroups import remove_groups
from deskrl.actor.desktops.sandbox import FOLDER_VARIABLE

_FILE = "desktop.json"
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class OwnerRecord:
    """Owner of a desktop's folder. A process is identified by its id and its start time."""

    owner_pid: int
    owner_start_ticks: int
    """Start time of the owner in clock ticks since boot."""
    groups: tuple[Path, ...]
    """Control groups of the desktop."""

    @classmethod
    def for_this_process(cls, groups: tuple[Path, ...]) -> OwnerRecord:
        """Return the record of a desktop that this process starts."""
        ticks = _start_ticks(os.getpid())
        assert ticks is not None
        return cls(os.getpid(), ticks, groups)

    @classmethod
    def read(cls, folder: Path) -> OwnerRecord:
        """Read the record of a desktop's folder; raises FileNotFoundError."""
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return cls(record["pid"], record["start_ticks"], tuple(map(Path, record["groups"])))

    def write(self, folder: Path) -> None:
        """Write the record into a desktop's folder."""
        record = {"pid": self.owner_pid, "start_ticks": self.owner_start_ticks, "groups": [*map(str, self.groups)]}
        (folder / _FILE).write_text(json.dumps(record), encoding="utf-8")

    @property
    def is_owner_alive(self) -> bool:
        """Whether the owner process still runs."""
        return _start_ticks(self.owner_pid) == self.owner_start_ticks


def reap_orphans(run_root: Path) -> int:
    """Terminate and remove the desktops below `run_root` whose owner has ended; return their number."""
    num_reaped = 0
    for folder in sorted(run_root.absolute().iterdir()) if run_root.is_dir() else []:
        try:
            record = OwnerRecord.read(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not record.is_owner_alive:
            _kill_processes(folder)
            remove_groups(record.groups)
            with contextlib.suppress(FileNotFoundError):  # another process removes it at the same time
                shutil.rmtree(folder)
            num_reaped += 1
    with contextlib.suppress(OSError):  # it still contains desktops of live owners
        run_root.rmdir()
    return num_reaped


def find_sandbox_processes(folder: Path) -> list[int]:
    """Return the process ids (as on the host) of the sandbox whose desktop has this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if FOLDER_VARIABLE.encode() in words and os.fsencode(folder) in words:
                    found.append(int(entry.name))
    return found


def _kill_processes(folder: Path) -> None:
    """Kill a sandbox and wait for its end. The kernel ends all other processes with its first process."""
    for pid in find_sandbox_processes(folder):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(descriptor, "rb"):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _KILL_TIMEOUT_S)


def _start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return int(fields[19]) if fields[0] not in "ZX" else None

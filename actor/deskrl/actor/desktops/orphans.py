"""What a run that was killed leaves behind, and its removal. Knows records, processes and control groups.

Each desktop's folder holds a record: who owns it, and which control groups are its. A folder whose owner is gone is an
orphan: processes that carry its name on their command line are ended, then its groups and the folder are removed.
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

from deskrl.actor.desktops.limits import remove_groups
from deskrl.actor.desktops.sandbox import TAG

_FILE = "desktop.json"
_KILL_S = 10.0


@dataclass(frozen=True)
class Record:
    """Who owns a desktop's folder. A process is known by its id and the time at which it started."""

    owner_pid: int
    owner_start_ticks: int
    groups: tuple[Path, ...]

    @classmethod
    def of_this_process(cls, groups: tuple[Path, ...]) -> Record:
        """The record of a desktop that this process starts."""
        ticks = _start_ticks(os.getpid())
        assert ticks is not None
        return cls(os.getpid(), ticks, groups)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record in `folder`; raises FileNotFoundError."""
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return cls(record["pid"], record["start_ticks"], tuple(map(Path, record["groups"])))

    def write(self, folder: Path) -> None:
        """Put the record into `folder`."""
        record = {"pid": self.owner_pid, "start_ticks": self.owner_start_ticks, "groups": [*map(str, self.groups)]}
        (folder / _FILE).write_text(json.dumps(record), encoding="utf-8")

    @property
    def owner_lives(self) -> bool:
        """Whether the owner still runs."""
        return _start_ticks(self.owner_pid) == self.owner_start_ticks


def reap_orphans(run_root: Path) -> int:
    """End and remove desktops below `run_root` whose owner is gone; how many there were."""
    num_reaped = 0
    for folder in sorted(run_root.absolute().iterdir()) if run_root.is_dir() else []:
        try:
            record = Record.read(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not record.owner_lives:
            _end_processes(folder)
            remove_groups(record.groups)
            shutil.rmtree(folder)
            num_reaped += 1
    with contextlib.suppress(OSError):  # other desktops still live in it
        run_root.rmdir()
    return num_reaped


def processes_of(folder: Path) -> list[int]:
    """Sandbox processes of the desktop in `folder`, as the host sees them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if TAG.encode() in words and os.fsencode(folder) in words:
                    found.append(int(entry.name))
    return found


def _end_processes(folder: Path) -> None:
    """SIGKILL, and wait until they have ended: the first process of a sandbox takes all others with it."""
    for pid in processes_of(folder):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with open(descriptor, "rb"):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], _KILL_S)


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none (a zombie counts as none)."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return int(fields[19]) if fields[0] not in "ZX" else None

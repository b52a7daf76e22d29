"""Folder of the store: where it is, and whether its file system can hold SQLite's database with a write-ahead log."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import psutil

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir

_log = logging.getLogger(__name__)

NETWORK_FILE_SYSTEMS = {
    "NFS": ("nfs", "nfs3", "nfs4"),
    "SMB": ("cifs", "smb3", "smbfs"),
    "Lustre": ("lustre",),
    "GPFS": ("gpfs", "mmfs"),
    "CephFS": ("ceph", "fuse.ceph", "fuse.ceph-fuse"),
    "BeeGFS": ("beegfs", "beegfs_nodev", "fuse.beegfs"),
    "GlusterFS": ("glusterfs", "fuse.glusterfs"),
    "WekaFS": ("wekafs", "fuse.wekafs"),
}
"""Network file systems by name, with the types that the kernel gives them.

SQLite's write-ahead log needs memory that all processes on a file share, and its locks must hold on every machine.
"""
_HINT = "set replay.folder to a folder on a local disk of the machine on which replay runs"
_PROBE_S = 30.0
_PROBE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
print(connection.execute("SELECT number FROM probe").fetchall())
try:
    connection.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError:
    print("locked")
"""
"""Second process of the probe: it must see the row in the write-ahead log, and must not get the lock of the writer."""


def open_folder(config: RunConfig) -> Path:
    """Return the folder of the store, after creating it if it is in `replay.folder`.

    The run directory then has a link to it, by which all commands on this machine find it. The link alone says which
    folder belongs to the run: a run of the same name that starts later gets another one.

    Raises:
        UserError: the file system is not suitable, the run has a store elsewhere, or the folder cannot be created.
    """
    check_file_system(config)
    replay, parent = RunDir(config.run_dir).replay, config.replay.folder
    if replay.is_symlink():
        return _linked_folder(replay, parent)
    if parent is None:
        return replay
    folder = parent / f"{config.name}-{uuid.uuid4().hex[:8]}"
    try:
        _link(replay, folder)
    except OSError as error:
        raise UserError(f"replay.folder: {folder} cannot be created: {error.strerror}", _HINT) from error
    return folder


def check_file_system(config: RunConfig) -> None:
    """Check that the file system of the store is suitable for SQLite; an unknown one in user space is tried out.

    Raises:
        UserError: it is a network file system, or the trial failed.
    """
    folder = config.replay.folder or RunDir(config.run_dir).replay
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    kind = file_system_of(existing, [(it.mountpoint, it.fstype) for it in psutil.disk_partitions(all=True)])
    name = next((name for name, kinds in NETWORK_FILE_SYSTEMS.items() if kind in kinds), None)
    if name is not None:
        raise UserError(f"{folder}: is on {name}, a network file system, on which SQLite loses data", _HINT)
    if kind.startswith("fuse"):
        problem = probe(existing)
        if problem:
            raise UserError(f"{folder}: is on a file system ({kind}) that is not suitable for SQLite: {problem}", _HINT)
        _log.warning("%s is on a file system in user space (%s), which SQLite may not trust: %s", folder, kind, _HINT)


def file_system_of(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """Return the type of the file system of an existing path.

    Args:
        path: the path; links in it are followed.
        mounts: mount point and type of each file system, in the order in which they were mounted.
    """
    resolved = path.resolve()
    found = [(len(Path(point).parts), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    depth = max((num_parts for num_parts, _ in found), default=0)
    return next((kind for num_parts, kind in reversed(found) if num_parts == depth), "")


def probe(folder: Path) -> str:
    """Try out locks and shared memory between two processes; return what does not work, or an empty string."""
    try:
        with tempfile.TemporaryDirectory(prefix=".deskrl-probe-", dir=folder) as trial:
            path = Path(trial, "probe.sqlite")
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                    return "it has no shared memory"
                connection.execute("CREATE TABLE probe (number INTEGER)")
                connection.execute("INSERT INTO probe VALUES (1)")
                connection.execute("BEGIN IMMEDIATE")
                command = [sys.executable, "-c", _PROBE, str(path)]
                other = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except (sqlite3.Error, OSError) as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    row, _, lock = other.stdout.partition("\n")
    if row != "[(1,)]":
        return "another process does not see what was written"
    return "" if lock.strip() == "locked" else "another process gets a lock that is taken"


def _linked_folder(replay: Path, parent: Path | None) -> Path:
    """Return the folder to which the link in a run directory leads.

    Raises:
        UserError: it is on another machine, or not in `parent`.
    """
    folder = replay.readlink()
    if not folder.exists():
        raise UserError(
            f"{replay}: leads to {folder}, which does not exist on this machine",
            "run replay on the machine that has it, or remove the link to start with an empty store",
        )
    if parent not in (None, folder.parent):
        hint = f"set it to {folder.parent}, or move the store and the link"
        raise UserError(f"replay.folder: the store of this run is in {folder}", hint)
    return folder


def _link(replay: Path, folder: Path) -> None:
    """Create the folder of the store, and a link to it in the run directory, in which it would otherwise be.

    Raises:
        UserError: the run has a store in its run directory.
    """
    if replay.is_dir() and any(replay.iterdir()):
        hint = f"move its files to {folder} and replace it by a link to that folder, or unset replay.folder"
        raise UserError(f"replay.folder: the store of this run is in {replay}", hint)
    folder.mkdir(parents=True)
    replay.parent.mkdir(parents=True, exist_ok=True)
    if replay.is_dir():
        replay.rmdir()
    replay.symlink_to(folder)
